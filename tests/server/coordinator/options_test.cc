#include "server/coordinator/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<ParsedOptions> Parse(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "epserve-coordinator");
  return ParseOptions(static_cast<int>(flags.size()), flags.data());
}

std::string Refusal(std::vector<const char*> flags) {
  const auto parsed = Parse(std::move(flags));
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(parsed.status().message());
}

TEST(OptionsTest, DefaultsAreThoseOfTheHelpText) {
  const auto parsed = Parse({"--checkpoint=/models/tiny/"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Options& options = *parsed->options;
  EXPECT_EQ(options.model_name, "tiny");
  EXPECT_EQ(options.num_workers, 4);
  EXPECT_THAT(options.listen, ElementsAre("127.0.0.1:8001"));
  EXPECT_EQ(options.metrics_listen, "127.0.0.1:8002");
  EXPECT_EQ(options.max_batch_tokens, 4096);
  EXPECT_EQ(options.queue_capacity, 1024);
  EXPECT_FALSE(options.separate_triggers);
  EXPECT_EQ(options.count_exchange, "auto");
  EXPECT_EQ(options.lease_ms, 1000);
  EXPECT_EQ(options.busy_poll_us, 0);
}

TEST(OptionsTest, BusyPollIsBoundedSoThatAnIdleCoordinatorSleeps) {
  EXPECT_EQ(Parse({"--checkpoint=/m", "--busy-poll-us=50"})->options->busy_poll_us, 50);
  EXPECT_THAT(Refusal({"--checkpoint=/m", "--busy-poll-us=10001"}), HasSubstr("--busy-poll-us"));
  EXPECT_THAT(Refusal({"--checkpoint=/m", "--busy-poll-us=-1"}), HasSubstr("--busy-poll-us"));
}

TEST(OptionsTest, ModelIsNamedAsTheDirectoryIsGivenNotAsALinkLeadsOn) {
  const std::filesystem::path dir =
      std::filesystem::path(testing::TempDir()) / absl::StrCat("name-", ::getpid());
  std::filesystem::create_directories(dir / "snapshots" / "0123abc");
  std::filesystem::create_directory_symlink(dir / "snapshots" / "0123abc", dir / "mixtral");
  const auto name = [](const std::string& given) {
    const std::string flag = "--checkpoint=" + given;
    return Parse({flag.c_str()})->options->model_name;
  };
  EXPECT_EQ(name((dir / "mixtral").string()), "mixtral");
  EXPECT_EQ(name((dir / "mixtral").string() + "/"), "mixtral");
  EXPECT_EQ(name((dir / "snapshots" / ".").string()), "snapshots");
  EXPECT_EQ(name("."), std::filesystem::current_path().filename().string());
  std::filesystem::remove_all(dir);
}

TEST(OptionsTest, RepeatedListenKeepsEveryAddress) {
  const auto parsed =
      Parse({"--checkpoint=m", "--listen=127.0.0.1:0", "--listen", "unix:/tmp/epserve.sock",
             "--listen=[::1]:9", "--shm-key-prefix=a", "--shm-key-prefix=b"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->options->listen,
              ElementsAre("127.0.0.1:0", "unix:/tmp/epserve.sock", "[::1]:9"));
  EXPECT_THAT(parsed->options->shm_key_prefixes, ElementsAre("a", "b"));
}

TEST(OptionsTest, EnvironmentSetsWhatFlagsLeaveOpen) {
  ::setenv("EPSERVE_QUEUE_CAPACITY", "7", 1);
  ::setenv("EPSERVE_TRIGGER", "separate", 1);
  const auto parsed = Parse({"--checkpoint=m", "--queue-capacity=9"});
  ::unsetenv("EPSERVE_QUEUE_CAPACITY");
  ::unsetenv("EPSERVE_TRIGGER");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->options->queue_capacity, 9);
  EXPECT_TRUE(parsed->options->separate_triggers);
}

TEST(OptionsTest, CountExchangeIsOneOfThree) {
  for (const char* mode : {"coordinator", "device", "auto"}) {
    const std::string flag = std::string("--count-exchange=") + mode;
    const auto parsed = Parse({"--checkpoint=m", flag.c_str()});
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->options->count_exchange, mode);
  }
  EXPECT_THAT(Refusal({"--checkpoint=m", "--count-exchange=streams"}),
              HasSubstr("--count-exchange"));
}

TEST(OptionsTest, ListeningBeyondTheMachineNeedsInsecure) {
  for (const char* address :
       {"--listen=0.0.0.0:8001", "--listen=[::]:8001", "--listen=127.evil.example:1"}) {
    EXPECT_THAT(Refusal({"--checkpoint=m", address}), HasSubstr("--insecure")) << address;
    EXPECT_TRUE(Parse({"--checkpoint=m", address, "--insecure"}).ok()) << address;
    EXPECT_TRUE(Parse({"--checkpoint=m", address, "--secrets-file=s"}).ok()) << address;
  }
  const char* metrics = "--metrics-listen=10.0.0.1:8002";
  EXPECT_THAT(Refusal({"--checkpoint=m", metrics}), HasSubstr("--plaintext-metrics"));
  EXPECT_TRUE(Parse({"--checkpoint=m", metrics, "--plaintext-metrics"}).ok());
  EXPECT_TRUE(Parse({"--checkpoint=m", metrics, "--insecure"}).ok());
  EXPECT_TRUE(Parse({"--checkpoint=m", metrics, "--secrets-file=s"}).ok());
}

TEST(OptionsTest, TlsFilesBelongTogetherAndMustBeThere) {
  EXPECT_THAT(Refusal({"--checkpoint=m", "--tls-cert=c"}), HasSubstr("--tls-key is missing"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--tls-key=k"}), HasSubstr("--tls-cert is missing"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--tls-cert=/nowhere", "--tls-key=k", "--tls-ca=a"}),
              HasSubstr("/nowhere"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--health-listen=127.0.0.1:1"}), HasSubstr("with TLS"));
}

TEST(OptionsTest, PrefixThatBeginsNoKeyIsRefused) {
  for (const char* prefix : {"../x", "/client-", "a b", "epserve-x", "sem.x"}) {
    const std::string flag = std::string("--shm-key-prefix=") + prefix;
    EXPECT_THAT(Refusal({"--checkpoint=m", flag.c_str()}),
                testing::AllOf(HasSubstr("--shm-key-prefix"), HasSubstr(prefix)));
  }
  for (const char* prefix : {"a", "epserve", "sem", ".", "A_b.-9"}) {
    const std::string flag = std::string("--shm-key-prefix=") + prefix;
    EXPECT_TRUE(Parse({"--checkpoint=m", flag.c_str()}).ok()) << prefix;
  }
}

TEST(OptionsTest, WrongValuesAreRefusedByFlag) {
  EXPECT_THAT(Refusal({}), HasSubstr("--checkpoint"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--workers=0"}), HasSubstr("--workers"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--workers=four"}), HasSubstr("--workers"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--slots=1.5"}), HasSubstr("--slots"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--slots=17"}), HasSubstr("--slots"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--trigger=never"}), HasSubstr("--trigger"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--log-format=xml"}), HasSubstr("--log-format"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--listen=127.0.0.1"}), HasSubstr("--listen"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--listen=127.0.0.1:65536"}), HasSubstr("--listen"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--listen=unix:"}), HasSubstr("--listen"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--metrics-listen=unix:/x"}),
              HasSubstr("--metrics-listen"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--cluster-id="}), HasSubstr("--cluster-id"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--cluster-id=a/b"}), HasSubstr("--cluster-id"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--frobnicate"}), HasSubstr("--frobnicate"));
  EXPECT_THAT(Refusal({"--checkpoint=m", "--max-batch-tokens=7"}), HasSubstr("probe"));
}

TEST(OptionsTest, HelpAndVersionPrintAndEnd) {
  const auto help = Parse({"--help"});
  ASSERT_TRUE(help.ok());
  EXPECT_FALSE(help->options.has_value());
  EXPECT_THAT(help->text, HasSubstr("EPSERVE_LEASE_MS"));
  const auto version = Parse({"--version"});
  ASSERT_TRUE(version.ok());
  EXPECT_EQ(version->text, "epserve-coordinator " EPSERVE_VERSION "\n");
}

}  // namespace
}  // namespace epserve::coordinator
