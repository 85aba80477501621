#include "server/coordinator/access_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::Not;

constexpr char kInfer[] = "/inference.GRPCInferenceService/ModelInfer";
constexpr char kConnect[] = "/epserve.v1.Control/Connect";
constexpr char kDrain[] = "/epserve.v1.Admin/DrainWorker";
constexpr char kHealth[] = "/grpc.health.v1.Health/Check";
constexpr char kSecret[] = "0123456789abcdef";

Caller WithUris(std::vector<std::string> uris) {
  Caller caller;
  caller.encrypted = true;
  caller.certificate_uris = std::move(uris);
  return caller;
}

class SecretsFile {
 public:
  explicit SecretsFile(const std::string& content)
      : path_(absl::StrCat(testing::TempDir(), "/secrets-", ::getpid())) {
    std::ofstream(path_) << content;
  }
  ~SecretsFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

TEST(AccessPolicyTest, EachRoleMayCallWhatIsItsOwn) {
  const auto policy = AccessPolicy::Create("", /*tls_required=*/true);
  ASSERT_TRUE(policy.ok());
  struct Case {
    const char* role;
    bool infer, connect, drain, scrape;
  };
  for (const Case& c :
       {Case{"frontend", true, false, false, false}, Case{"worker", false, true, false, false},
        Case{"operator", true, false, true, true}, Case{"metrics", false, false, false, true},
        Case{"other", false, false, false, false}}) {
    const Caller caller = WithUris({absl::StrCat("spiffe://cluster.local/ns/x/epserve/", c.role)});
    EXPECT_EQ(policy->Check(kInfer, caller).ok(), c.infer) << c.role;
    EXPECT_EQ(policy->Check(kConnect, caller).ok(), c.connect) << c.role;
    EXPECT_EQ(policy->Check(kDrain, caller).ok(), c.drain) << c.role;
    EXPECT_EQ(policy->Check(kScrapeMethod, caller).ok(), c.scrape) << c.role;
    EXPECT_EQ(policy->Check("/grpc.channelz.v1.Channelz/GetServers", caller).ok(), c.drain);
    EXPECT_TRUE(policy->Check(kHealth, caller).ok()) << c.role;
  }
}

TEST(AccessPolicyTest, RolesOfSeveralNamesAddUp) {
  const auto policy = AccessPolicy::Create("", true);
  const Caller caller = WithUris({"spiffe://a/epserve/worker", "spiffe://a/epserve/operator"});
  EXPECT_TRUE(policy->Check(kConnect, caller).ok());
  EXPECT_TRUE(policy->Check(kDrain, caller).ok());
}

TEST(AccessPolicyTest, NamesThatOnlyLookAlikeGrantNothing) {
  const auto policy = AccessPolicy::Create("", true);
  for (const char* uri :
       {"https://a/epserve/worker", "spiffe://a/epserve/worker/x", "spiffe://a/notepserve/worker",
        "spiffe://a/epserve/WORKER", "epserve/worker", ""}) {
    EXPECT_EQ(policy->Check(kConnect, WithUris({uri})).code(), StatusCode::kUnauthenticated) << uri;
  }
}

TEST(AccessPolicyTest, RefusalSaysWhatIsNeededAndWhoTheCallerIs) {
  const auto policy = AccessPolicy::Create("", true);
  const absl::Status status = policy->Check(kConnect, WithUris({"spiffe://a/epserve/frontend"}));
  EXPECT_EQ(status.code(), StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(status.message()), HasSubstr("needs the role worker"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("the caller is frontend"));
}

TEST(AccessPolicyTest, SecretGrantsItsRoleAndNoOther) {
  const SecretsFile file(absl::StrCat("# comment\n\nfrontend ", kSecret, "\n"));
  const auto policy = AccessPolicy::Create(file.path(), /*tls_required=*/false);
  ASSERT_TRUE(policy.ok()) << policy.status();
  Caller caller;
  caller.authorization = absl::StrCat("Bearer ", kSecret);
  EXPECT_TRUE(policy->Check(kInfer, caller).ok());
  EXPECT_EQ(policy->Check(kConnect, caller).code(), StatusCode::kPermissionDenied);
  for (const std::string& shown :
       {std::string(), std::string(kSecret), absl::StrCat("Bearer ", kSecret, "0"),
        std::string("Bearer 0123456789abcdeF"), std::string("Bearer ")}) {
    caller.authorization = shown;
    EXPECT_EQ(policy->Check(kInfer, caller).code(), StatusCode::kUnauthenticated) << shown;
  }
}

TEST(AccessPolicyTest, PlaintextMayAskForHealthAloneWhereTlsIsRequired) {
  const SecretsFile file(absl::StrCat("operator ", kSecret));
  const auto policy = AccessPolicy::Create(file.path(), /*tls_required=*/true);
  ASSERT_TRUE(policy.ok());
  Caller caller;
  caller.authorization = absl::StrCat("Bearer ", kSecret);
  EXPECT_TRUE(policy->Check(kHealth, caller).ok());
  EXPECT_EQ(policy->Check(kInfer, caller).code(), StatusCode::kUnauthenticated);
  caller.encrypted = true;
  EXPECT_TRUE(policy->Check(kInfer, caller).ok());
}

TEST(AccessPolicyTest, DamagedSecretsFileIsRefusedNamingTheLineAndNoSecret) {
  for (const char* line : {"boss 0123456789abcdef", "worker short", "worker", "worker a b c",
                           "worker 0123456789abcdef extra"}) {
    const SecretsFile file(absl::StrCat("frontend ", kSecret, "\n", line, "\n"));
    const absl::Status status = AccessPolicy::Create(file.path(), false).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << line;
    EXPECT_THAT(std::string(status.message()), HasSubstr("line 2"));
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("0123456789")));
  }
  const absl::Status missing = AccessPolicy::Create("/nowhere/secrets", false).status();
  EXPECT_EQ(missing.code(), StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("No such file or directory"));
  const SecretsFile empty("# none\n");
  EXPECT_EQ(AccessPolicy::Create(empty.path(), false).status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace epserve::coordinator
