// epserve-microbench as its users start it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

struct Outcome {
  int exit_code = -1;
  std::string output;  // stdout and stderr
};

Outcome RunProgram(const std::string& arguments) {
  Outcome outcome;
  FILE* pipe = ::popen((std::string(MICROBENCH) + " " + arguments + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return outcome;
  std::array<char, 4096> buffer;
  for (std::size_t count; (count = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    outcome.output.append(buffer.data(), count);
  }
  const int status = ::pclose(pipe);
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

constexpr char kSmall[] =
    "alltoallv --backend=host --ranks=3 --tokens=40 --hidden=72 --topk=3 --experts=7 "
    "--iterations=4 --warmup=1 ";

TEST(MicrobenchProgramTest, SmallShapePrintsOneJsonObjectWithAllFigures) {
  for (const std::string dtype : {"bf16", "fp16", "fp32"}) {
    const Outcome outcome = RunProgram(kSmall + ("--json --dtype=" + dtype));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
    const auto json = nlohmann::json::parse(outcome.output, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(json.is_object()) << outcome.output;
    for (const char* key : {"dispatch_us_p50", "dispatch_us_p99", "combine_us_p50",
                            "combine_us_p99", "copy_limit_us", "remote_bytes_per_rank"}) {
      ASSERT_TRUE(json.contains(key)) << key;
      EXPECT_GT(json[key].get<double>(), 0.0) << key;
    }
    EXPECT_LE(json["dispatch_us_p50"], json["dispatch_us_p99"]);
    EXPECT_LE(json["combine_us_p50"], json["combine_us_p99"]);
    EXPECT_EQ(json["backend"], "host");
    EXPECT_EQ(json["ranks"], 3);
    EXPECT_EQ(json["tokens"], 40);
    EXPECT_EQ(json["hidden"], 72);
    EXPECT_EQ(json["topk"], 3);
    EXPECT_EQ(json["experts"], 7);
    EXPECT_EQ(json["dtype"], dtype);
    EXPECT_EQ(json["iterations"], 4);
    EXPECT_EQ(json["verified_tokens"], 3 * 40 * 2);
  }
}

TEST(MicrobenchProgramTest, RpcPrintsOneJsonObjectWithEveryFloor) {
  const Outcome outcome = RunProgram(
      "rpc --json --workers=3 --message-bytes=64 --inline-bytes=300000 --request-bytes=100 "
      "--concurrency=8 --requests=200 --iterations=20 --warmup=2 --inline-iterations=2");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  const auto json = nlohmann::json::parse(outcome.output, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << outcome.output;
  EXPECT_EQ(json["benchmark"], "rpc");
  EXPECT_EQ(json["workers"], 3);
  EXPECT_EQ(json["message_bytes"], 64);
  EXPECT_EQ(json["inline_bytes"], 300000);
  EXPECT_EQ(json["request_bytes"], 100);
  EXPECT_EQ(json["concurrency"], 8);
  EXPECT_EQ(json["requests"], 200);
  EXPECT_EQ(json["iterations"], 20);
  EXPECT_EQ(json["inline_iterations"], 2);
  for (const char* transport : {"unix", "tcp"}) {
    const auto& figures = json[transport];
    for (const char* kind : {"stream", "unary"}) {
      for (const char* key : {"round_trip_us_p50", "inline_echo_us_p50", "requests_per_second",
                              "threads_requests_per_second"}) {
        EXPECT_GT(figures[kind][key].get<double>(), 0.0) << transport << kind << key;
      }
      EXPECT_LE(figures[kind]["round_trip_us_p50"], figures[kind]["round_trip_us_p99"]);
      EXPECT_LE(figures[kind]["inline_echo_us_p50"], figures[kind]["inline_echo_us_p99"]);
    }
    for (const char* key : {"one_worker_us_p50", "all_workers_us_p50"}) {
      EXPECT_GT(figures[key].get<double>(), 0.0) << transport << key;
    }
    EXPECT_LE(figures["all_workers_us_p50"], figures["all_workers_us_p99"]);
  }
}

TEST(MicrobenchProgramTest, RpcPrintsATableAndLeavesNoSocketFolder) {
  std::string folder = ::testing::TempDir() + "/microbench-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  ::setenv("TMPDIR", folder.c_str(), 1);
  const Outcome outcome = RunProgram(
      "rpc --workers=1 --inline-bytes=1000 --requests=10 --concurrency=2 --iterations=2 "
      "--warmup=0 --inline-iterations=1");
  ::unsetenv("TMPDIR");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("64 bytes and back, stream"));
  EXPECT_THAT(outcome.output, HasSubstr("to 1 workers, last one back"));
  EXPECT_EQ(::rmdir(folder.c_str()), 0) << "something is left in " << folder;
}

TEST(MicrobenchProgramTest, TableIsPrintedWithoutTheJsonFlag) {
  const Outcome outcome = RunProgram(kSmall);
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, HasSubstr("plain copy"));
  EXPECT_THAT(outcome.output, HasSubstr("dispatch"));
}

TEST(MicrobenchProgramTest, OneRankHasNothingRemoteAndStillRuns) {
  const Outcome outcome = RunProgram(
      "alltoallv --ranks=1 --tokens=8 --hidden=16 --topk=2 --experts=4 --iterations=2 --json");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_EQ(nlohmann::json::parse(outcome.output)["remote_bytes_per_rank"], 0);
}

TEST(MicrobenchProgramTest, UnknownBackendIsRefusedNamingWhatIsBuilt) {
  const Outcome outcome = RunProgram("alltoallv --backend=carrier-pigeon");
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.output, HasSubstr("backend \"carrier-pigeon\" is not in this build"));
  EXPECT_THAT(outcome.output, HasSubstr("host"));
}

TEST(MicrobenchProgramTest, SizesBeyondTheMemoryAreRefusedBeforeAnythingIsAllocated) {
  std::vector<std::string> commands = {
      "alltoallv --ranks=8 --tokens=1048576 --hidden=1048576 --topk=2 --experts=16"};  // 35 TB
  // The largest that rpc takes are 16 GiB, which larger machines have.
  const auto memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  if (memory < 0x1p34) {
    commands.push_back("rpc --request-bytes=1048576 --concurrency=1000 --inline-bytes=1073741824");
  }
  for (const std::string& arguments : commands) {
    const Outcome outcome = RunProgram(arguments);
    EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr("RESOURCE_EXHAUSTED"));
    EXPECT_THAT(outcome.output, HasSubstr("bytes available; lower --"));
  }
}

TEST(MicrobenchProgramTest, BadArgumentsAreRefusedWithExitCode2) {
  for (const char* arguments : {"",
                                "nothing",
                                "alltoallv --ranks=0",
                                "alltoallv --ranks=65",
                                "alltoallv --dtype=int8",
                                "alltoallv --tokens=x",
                                "alltoallv --topk=17",
                                "alltoallv --line-tokens=513",
                                "alltoallv --push-blocks=-1",
                                "alltoallv --unknown=1",
                                "alltoallv --topk=8 --experts=7",
                                "ffn --rows=0",
                                "ffn --experts=513",
                                "ffn --weights=fp32",
                                "rpc --workers=0",
                                "rpc --workers=65",
                                "rpc --message-bytes=0",
                                "rpc --inline-bytes=x",
                                "rpc --request-bytes=-1",
                                "rpc --concurrency=1001",
                                "rpc --iterations=0",
                                "rpc --unknown=1",
                                "ffn --distribution=odd",
                                "ffn --kernel=fast",
                                "ffn --unknown=1"}) {
    const Outcome outcome = RunProgram(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments;
    EXPECT_THAT(outcome.output, StartsWith("epserve-microbench: ")) << arguments;
  }
}

TEST(MicrobenchProgramTest, FeedForwardWithoutAGpuIsRefusedOrElseMeasured) {
  const Outcome outcome =
      RunProgram("ffn --rows=100 --experts=3 --hidden=64 --intermediate=32 --iterations=3 --json");
  if (outcome.exit_code == 0) {
    const auto json = nlohmann::json::parse(outcome.output, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(json.is_object()) << outcome.output;
    for (const char* key : {"ffn_us_p50", "ffn_us_p99", "tflops", "weight_gbps", "dense_tflops",
                            "copy_gbps", "relative_error"}) {
      EXPECT_GT(json[key].get<double>(), 0.0) << key;
    }
  } else {
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_THAT(outcome.output, StartsWith("epserve-microbench: UNAVAILABLE: ffn: "));
  }
}

TEST(MicrobenchProgramTest, HelpAndVersionExitWithZero) {
  const Outcome help = RunProgram("alltoallv --help");
  EXPECT_EQ(help.exit_code, 0);
  for (const char* flag : {"--backend", "--ranks", "--tokens", "--hidden", "--topk", "--experts",
                           "--dtype", "--iterations", "--warmup", "--json"}) {
    EXPECT_THAT(help.output, HasSubstr(flag));
  }
  const Outcome version = RunProgram("--version");
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.output, HasSubstr("epserve-microbench "));
}

TEST(MicrobenchProgramTest, EnvironmentSetsWhatFlagsDoAndIsParsedAsStrictly) {
  const std::string arguments = "alltoallv --tokens=8 --hidden=16 --iterations=2 --json";
  ::setenv("EPSERVE_RANKS", "2", 1);
  const Outcome accepted = RunProgram(arguments);
  ::setenv("EPSERVE_RANKS", "0", 1);
  const Outcome refused = RunProgram(arguments);
  ::unsetenv("EPSERVE_RANKS");
  ASSERT_EQ(accepted.exit_code, 0) << accepted.output;
  EXPECT_EQ(nlohmann::json::parse(accepted.output)["ranks"], 2);
  EXPECT_EQ(refused.exit_code, 2);
}

}  // namespace
