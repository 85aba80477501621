#include "server/worker/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace epserve::worker {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

constexpr char kIdChars[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-";

absl::StatusOr<ParsedOptions> Parse(std::vector<const char*> args) {
  args.insert(args.begin(), "epserve-worker");
  return ParseOptions(static_cast<int>(args.size()), args.data());
}

void ExpectRefused(const std::vector<const char*>& args, const std::string& text) {
  const auto parsed = Parse(args);
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(text));
}

TEST(OptionsTest, DefaultsAreTheDocumentedOnes) {
  const auto parsed = Parse({"--checkpoint", "/models/m"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Options& options = *parsed->options;
  EXPECT_EQ(options.coordinator, "127.0.0.1:8001");
  EXPECT_EQ(options.checkpoint_dir, "/models/m");
  EXPECT_THAT(options.worker_id, EndsWith("-" + std::to_string(getpid())));
  EXPECT_EQ(options.worker_id.find_first_not_of(kIdChars), std::string::npos) << options.worker_id;
  EXPECT_LE(options.worker_id.size(), 64u);
  EXPECT_FALSE(options.node.empty());
  EXPECT_EQ(options.cluster_id, "epserve");
  EXPECT_EQ(options.max_batch_tokens, 4096);
  EXPECT_EQ(options.num_slots, 2);
  EXPECT_EQ(options.compute_threads, 1);
  EXPECT_EQ(options.peer_timeout_ms, 30000);
  EXPECT_EQ(options.leave_timeout_ms, 15000);
  EXPECT_EQ(options.busy_poll_us, 0);
  EXPECT_EQ(options.backend, "host");
  EXPECT_EQ(options.device, -1);
  EXPECT_EQ(options.comm_blocks, 24);
  EXPECT_EQ(options.dispatch_dtype, "bf16");
  EXPECT_EQ(options.handle_type, "auto");
  EXPECT_EQ(options.health_listen, "");
}

TEST(OptionsTest, HealthListenIsAnAddress) {
  for (const char* flag : {"--health-listen=0.0.0.0:8003", "--health-listen=unix:/run/health"}) {
    const auto parsed = Parse({"--checkpoint=/m", flag});
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_THAT(flag, EndsWith("=" + parsed->options->health_listen));
  }
  ExpectRefused({"--checkpoint=/m", "--health-listen=8003"}, "--health-listen \"8003\"");
}

TEST(OptionsTest, FlagsAreTaken) {
  const auto parsed =
      Parse({"--checkpoint=/m", "--coordinator=unix:/run/c", "--worker-id=w3", "--cluster-id=prod",
             "--max-batch-tokens=64", "--slots=3", "--compute-threads=2", "--peer-timeout-ms=500",
             "--leave-timeout-ms=700", "--busy-poll-us=50", "--backend=cuda", "--device=3",
             "--local-rank=5", "--comm-blocks=32", "--dispatch-dtype=fp8", "--handle-dir=/tmp",
             "--handle-type=fabric", "--log-format=json", "--log-level=debug"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Options& options = *parsed->options;
  EXPECT_EQ(options.coordinator, "unix:/run/c");
  EXPECT_EQ(options.worker_id, "w3");
  EXPECT_EQ(options.cluster_id, "prod");
  EXPECT_EQ(options.max_batch_tokens, 64);
  EXPECT_EQ(options.num_slots, 3);
  EXPECT_EQ(options.compute_threads, 2);
  EXPECT_EQ(options.peer_timeout_ms, 500);
  EXPECT_EQ(options.leave_timeout_ms, 700);
  EXPECT_EQ(options.busy_poll_us, 50);
  EXPECT_EQ(options.backend, "cuda");
  EXPECT_EQ(options.device, 3);
  EXPECT_EQ(options.local_rank, 5);
  EXPECT_EQ(options.comm_blocks, 32);
  EXPECT_EQ(options.dispatch_dtype, "fp8");
  EXPECT_EQ(options.handle_dir, "/tmp");
  EXPECT_EQ(options.handle_type, "fabric");
  EXPECT_EQ(options.log_format, "json");
  EXPECT_EQ(options.log_level, "debug");
}

TEST(OptionsTest, LongestWorkerIdOfEveryKindOfCharacterIsTaken) {
  const std::string id = std::string(59, 'w') + "Z_.-9";
  const auto parsed = Parse({"--checkpoint=/m", "--worker-id", id.c_str()});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->options->worker_id, id);
}

TEST(OptionsTest, EnvironmentStandsInForAFlagAndTheFlagWins) {
  setenv("EPSERVE_WORKER_ID", "from-env", 1);
  setenv("EPSERVE_CHECKPOINT", "/env", 1);
  const auto from_env = Parse({});
  const auto from_flag = Parse({"--worker-id=from-flag"});
  unsetenv("EPSERVE_WORKER_ID");
  unsetenv("EPSERVE_CHECKPOINT");
  ASSERT_TRUE(from_env.ok()) << from_env.status();
  EXPECT_EQ(from_env->options->worker_id, "from-env");
  EXPECT_EQ(from_env->options->checkpoint_dir, "/env");
  ASSERT_TRUE(from_flag.ok()) << from_flag.status();
  EXPECT_EQ(from_flag->options->worker_id, "from-flag");
}

TEST(OptionsTest, WrongValuesAreRefusedNamingTheFlag) {
  ExpectRefused({}, "--checkpoint");
  ExpectRefused({"--checkpoint=/m", "--slots=0"}, "--slots");
  ExpectRefused({"--checkpoint=/m", "--slots=17"}, "--slots");
  ExpectRefused({"--checkpoint=/m", "--slots=two"}, "--slots");
  ExpectRefused({"--checkpoint=/m", "--max-batch-tokens=0"}, "--max-batch-tokens");
  ExpectRefused({"--checkpoint=/m", "--coordinator=here"}, "--coordinator");
  ExpectRefused({"--checkpoint=/m", "--coordinator=here:0"}, "--coordinator");
  ExpectRefused({"--checkpoint=/m", "--coordinator=unix:"}, "--coordinator");
  ExpectRefused({"--checkpoint=/m", "--cluster-id=a/b"}, "--cluster-id");
  ExpectRefused({"--checkpoint=/m", "--cluster-id="}, "--cluster-id");
  ExpectRefused({"--checkpoint=/m", "--worker-id=a b"}, "--worker-id");
  ExpectRefused({"--checkpoint=/m", "--worker-id=w\n1"}, "--worker-id \"w\\n1\"");
  ExpectRefused({"--checkpoint=/m", "--worker-id=w\"1"}, "--worker-id");
  ExpectRefused({"--checkpoint=/m", "--worker-id="}, "--worker-id");
  ExpectRefused({"--checkpoint=/m", "--worker-id", std::string(65, 'w').c_str()}, "{1,64}");
  ExpectRefused({"--checkpoint=/m", "--log-format=xml"}, "--log-format");
  ExpectRefused({"--checkpoint=/m", "--unknown"}, "--unknown");
}

TEST(OptionsTest, WrongValuesOfTheBackendsFlagsAreRefused) {
  ExpectRefused({"--checkpoint=/m", "--backend=tpu"}, "--backend");
  ExpectRefused({"--checkpoint=/m", "--device=-1"}, "--device");
  ExpectRefused({"--checkpoint=/m", "--local-rank=x"}, "--local-rank");
  ExpectRefused({"--checkpoint=/m", "--comm-blocks=0"}, "--comm-blocks");
  ExpectRefused({"--checkpoint=/m", "--dispatch-dtype=fp4"}, "--dispatch-dtype");
  ExpectRefused({"--checkpoint=/m", "--handle-type=ipc"}, "--handle-type");
  ExpectRefused({"--checkpoint=/m", "--handle-dir=/proc/none"}, "--handle-dir");
}

TEST(OptionsTest, HelpAndVersionAreTexts) {
  const auto help = Parse({"--help"});
  ASSERT_TRUE(help.ok());
  EXPECT_FALSE(help->options.has_value());
  for (const char* text : {"--coordinator", "--peer-timeout-ms", "milliseconds", "4096"}) {
    EXPECT_THAT(help->text, HasSubstr(text));
  }
  const auto version = Parse({"--version"});
  ASSERT_TRUE(version.ok());
  EXPECT_EQ(version->text, std::string("epserve-worker ") + EPSERVE_VERSION + "\n");
}

}  // namespace
}  // namespace epserve::worker
