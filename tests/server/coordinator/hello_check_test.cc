#include "server/coordinator/hello_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace epserve::coordinator {
namespace {

using testing::HasSubstr;

HelloInfo Worker(const std::string& version) {
  HelloInfo hello;
  hello.worker_id = "w0";
  hello.incarnation = "i";
  hello.version = version;
  hello.backend = "host";
  return hello;
}

absl::Status Check(const std::string& workers, const std::string& coordinators) {
  HelloPolicy policy;
  policy.version = coordinators;
  return CheckHello(Worker(workers), policy);
}

TEST(HelloCheckTest, WorkerMayBeOneMinorVersionOff) {
  for (const char* version : {"1.2.3", "1.2.9", "1.1.0", "1.3.0"}) {
    EXPECT_TRUE(Check(version, "1.2.3").ok()) << version;
  }
}

TEST(HelloCheckTest, FurtherOffItIsRefusedNamingBothVersions) {
  for (const char* version : {"1.0.0", "1.4.0", "2.2.3", "0.2.3", "", "1", "1.2", "1.x.3", "1.-2.3",
                              "1.2.3.4", "99999999999999999999.2.3"}) {
    const absl::Status status = Check(version, "1.2.3");
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << version;
    EXPECT_THAT(std::string(status.message()), HasSubstr("1.2.3"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(version));
    EXPECT_THAT(std::string(status.message()), HasSubstr("one minor version at a time"));
  }
}

}  // namespace
}  // namespace epserve::coordinator
