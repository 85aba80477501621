#include "client/command/options.h"

#include <cstdlib>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace epserve::client {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

absl::StatusOr<ParsedCommand> Parse(std::vector<const char*> words, int cores = 1) {
  words.insert(words.begin(), "epserve");
  return ParseCommand(static_cast<int>(words.size()), words.data(), cores);
}

template <typename Options>
Options ParseAs(const std::vector<const char*>& words, int cores = 1) {
  const auto parsed = Parse(words, cores);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return std::get<Options>(*parsed->command);
}

// Sets a variable for the length of a test.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedVariable() { unsetenv(name_); }

 private:
  const char* name_;
};

TEST(OptionsTest, BenchPutsTensorsInSharedMemoryWhereAsked) {
  EXPECT_EQ(ParseAs<BenchOptions>({"bench"}).memory, BenchMemory::kMessages);
  const auto bench =
      ParseAs<BenchOptions>({"bench", "--shared-memory", "system", "--shm-key-prefix", "tensors-"});
  EXPECT_EQ(bench.memory, BenchMemory::kSystem);
  EXPECT_EQ(bench.shm_key_prefix, "tensors-");
  const auto cuda =
      ParseAs<BenchOptions>({"bench", "--shared-memory", "cuda", "--cuda-device", "3"});
  EXPECT_EQ(cuda.memory, BenchMemory::kCuda);
  EXPECT_EQ(cuda.cuda_device, 3);
  EXPECT_FALSE(Parse({"bench", "--shared-memory", "gpu"}).ok());
  const auto empty = Parse({"bench", "--shared-memory", "system", "--tokens", "0"});
  EXPECT_THAT(std::string(empty.status().message()), HasSubstr("--tokens"));
}

TEST(OptionsTest, MistakesAreRefusedByName) {
  const auto error = [](const std::vector<const char*>& words) {
    const auto parsed = Parse(words);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(parsed.status().message());
  };
  EXPECT_THAT(error({}), HasSubstr("subcommand"));
  EXPECT_THAT(error({"dance"}), HasSubstr("'dance'"));
  EXPECT_THAT(error({"up"}), HasSubstr("--checkpoint"));
  EXPECT_THAT(error({"up", "--checkpoint=x", "--workers=0"}), HasSubstr("--workers"));
  EXPECT_THAT(error({"up", "--checkpoint=x", "--workers=two"}), HasSubstr("two"));
  EXPECT_THAT(error({"up", "--checkpoint=x", "--lease-ms=-1"}), HasSubstr("'-1'"));
  EXPECT_THAT(error({"up", "--checkpoint=x", "--slots=two"}), HasSubstr("--slots"));
  EXPECT_THAT(error({"up", "--checkpoint=x", "--max-batch-tokens=1e3"}), HasSubstr("'1e3'"));
  EXPECT_THAT(error({"up", "--checkpoint=x", "--queue-capacity=99999999999999999999"}),
              HasSubstr("--queue-capacity"));
  EXPECT_THAT(error({"bench", "--dtype=fp64"}), HasSubstr("--dtype"));
  EXPECT_THAT(error({"bench", "--tokens=1x"}), HasSubstr("1x"));
  EXPECT_THAT(error({"bench", "--rate=nan"}), HasSubstr("'nan' is not a number"));
  EXPECT_THAT(error({"bench", "--timeout=nan"}), HasSubstr("--timeout"));
  EXPECT_THAT(error({"bench", "--seed=-1"}), HasSubstr("'-1'"));
  EXPECT_THAT(error({"make-checkpoint", "--output=x", "--topk=17"}), HasSubstr("--topk"));
  EXPECT_THAT(error({"bench", "--unheard-of=1"}), HasSubstr("--unheard-of"));
  EXPECT_THAT(error({"verify", "--checkpoint=x", "--layers=1,a"}), HasSubstr("'a'"));
  EXPECT_THAT(error({"verify", "--checkpoint=x", "--layers="}), HasSubstr("--layers"));
  EXPECT_THAT(error({"infer", "--input=a"}), HasSubstr("--output"));
  EXPECT_THAT(error({"drain"}), HasSubstr("WORKER_ID"));
  EXPECT_THAT(error({"status", "--watch=never"}), HasSubstr("never"));
  EXPECT_THAT(error({"make-checkpoint", "--output=x", "--architecture=gpt"}),
              HasSubstr("--architecture"));
}

TEST(OptionsTest, HelpAndVersionAreTextWithoutACommand) {
  for (const std::vector<const char*>& words :
       std::vector<std::vector<const char*>>{{"--help"}, {"--version"}, {"bench", "--help"}}) {
    const auto parsed = Parse(words);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_FALSE(parsed->command);
    EXPECT_FALSE(parsed->text.empty());
  }
  EXPECT_THAT(Parse({"bench", "--help"})->text, HasSubstr("--concurrency"));
  EXPECT_THAT(Parse({"bench", "--help"})->text, HasSubstr("127.0.0.1:8001"));
  EXPECT_THAT(Parse({"bench", "--help"})->text, HasSubstr("EPSERVE_SERVER"));
  EXPECT_THAT(Parse({"bench", "--help"})->text, HasSubstr("at most --timeout later"));
  EXPECT_THAT(Parse({"--version"})->text, HasSubstr(EPSERVE_VERSION));
}

TEST(OptionsTest, UpHandsFlagsOnToThoseWhoTakeThem) {
  const auto up =
      ParseAs<UpOptions>({"up", "--checkpoint=dir", "--max-batch-tokens=128", "--queue-capacity=9",
                          "--peer-timeout-ms=50", "--leave-timeout-ms=60", "--busy-poll-us=20",
                          "--allow-client-shm", "--log-format=json"});
  EXPECT_THAT(up.coordinator_args, Contains("--max-batch-tokens=128"));
  EXPECT_THAT(up.worker_args, Contains("--max-batch-tokens=128"));
  EXPECT_THAT(up.coordinator_args, Contains("--queue-capacity=9"));
  EXPECT_THAT(up.worker_args, Not(Contains("--queue-capacity=9")));
  EXPECT_THAT(up.coordinator_args, Contains("--busy-poll-us=20"));
  EXPECT_THAT(up.worker_args, Contains("--busy-poll-us=20"));
  EXPECT_THAT(up.worker_args, Contains("--peer-timeout-ms=50"));
  EXPECT_THAT(up.coordinator_args, Not(Contains("--peer-timeout-ms=50")));
  EXPECT_THAT(up.worker_args, Contains("--leave-timeout-ms=60"));
  EXPECT_THAT(up.coordinator_args, Not(Contains("--leave-timeout-ms=60")));
  EXPECT_THAT(up.coordinator_args, Contains("--allow-client-shm"));
  EXPECT_THAT(up.coordinator_args, Contains("--log-format=json"));
  EXPECT_THAT(up.worker_args, Contains("--log-format=json"));
  EXPECT_TRUE(up.restart);
  EXPECT_FALSE(ParseAs<UpOptions>({"up", "--checkpoint=dir", "--no-restart"}).restart);
}

TEST(OptionsTest, UpLooksWithGpusWhereCoresAreToSpare) {
  const std::vector<const char*> gpus = {"up", "--checkpoint=dir", "--workers=4", "--backend=cuda"};
  const auto with = [&gpus](const char* flag) {
    std::vector<const char*> words = gpus;
    words.push_back(flag);
    return words;
  };
  // Of each worker three threads, the coordinator's and a client's look, and two cores remain.
  for (const auto& args :
       {ParseAs<UpOptions>(gpus, 16).coordinator_args, ParseAs<UpOptions>(gpus, 16).worker_args,
        ParseAs<UpOptions>(with("--slots=1"), 12).worker_args}) {
    EXPECT_THAT(args, Contains("--busy-poll-us=2000"));
  }
  for (const auto& up : {ParseAs<UpOptions>(gpus, 15), ParseAs<UpOptions>(with("--slots=3"), 16),
                         ParseAs<UpOptions>({"up", "--checkpoint=dir", "--backend=host"}, 64),
                         ParseAs<UpOptions>({"up", "--checkpoint=dir"}, 64)}) {
    EXPECT_THAT(up.coordinator_args, Not(Contains(HasSubstr("busy-poll"))));
    EXPECT_THAT(up.worker_args, Not(Contains(HasSubstr("busy-poll"))));
  }
  // What is given stands.
  EXPECT_THAT(ParseAs<UpOptions>(with("--busy-poll-us=0"), 64).worker_args,
              Contains("--busy-poll-us=0"));
}

TEST(OptionsTest, UpHandsLimitsOfMessagesAndTimesToTheCoordinatorAlone) {
  const auto up = ParseAs<UpOptions>({"up", "--checkpoint=dir", "--max-message-bytes=1000000",
                                      "--formation-timeout-ms=700", "--batch-timeout-ms=800"});
  for (const char* argument :
       {"--max-message-bytes=1000000", "--formation-timeout-ms=700", "--batch-timeout-ms=800"}) {
    EXPECT_THAT(up.coordinator_args, Contains(argument));
    EXPECT_THAT(up.worker_args, Not(Contains(argument)));
  }
  // What is not given is the children's own to choose.
  const auto defaults = ParseAs<UpOptions>({"up", "--checkpoint=dir"});
  EXPECT_THAT(defaults.coordinator_args, Not(Contains(HasSubstr("batch"))));
  EXPECT_THAT(defaults.coordinator_args, Not(Contains(HasSubstr("formation"))));
}

TEST(OptionsTest, ListsAndWordsAreReadStrictly) {
  EXPECT_THAT(ParseAs<VerifyOptions>({"verify", "--checkpoint=x", "--layers=3,1,3"}).layers,
              ElementsAre(1, 3));
  EXPECT_TRUE(ParseAs<VerifyOptions>({"verify", "--checkpoint=x"}).layers.empty());
  EXPECT_THAT(ParseAs<VerifyOptions>({"verify", "--checkpoint=x"}).dtypes,
              ElementsAre("fp32", "bf16", "fp16"));
  EXPECT_THAT(ParseAs<VerifyOptions>({"verify", "--checkpoint=x", "--dtype=bf16"}).dtypes,
              ElementsAre("bf16"));
  EXPECT_TRUE(ParseAs<BenchOptions>({"bench", "--routing=server"}).server_routes);
  EXPECT_FALSE(ParseAs<BenchOptions>({"bench"}).server_routes);
  EXPECT_FALSE(
      ParseAs<MakeCheckpointOptions>({"make-checkpoint", "--output=x", "--no-router"}).router);
  EXPECT_EQ(ParseAs<DrainOptions>({"drain", "worker-3"}).worker_id, "worker-3");
  EXPECT_EQ(ParseAs<HealthOptions>({"health"}).service, "readiness");
  EXPECT_EQ(ParseAs<HealthOptions>({"health", "--service=liveness"}).service, "liveness");
}

TEST(OptionsTest, BenchTakesAttemptsButNotForStreamsWhichAreNeverRetried) {
  EXPECT_EQ(ParseAs<BenchOptions>({"bench"}).attempts, 1);
  EXPECT_EQ(ParseAs<BenchOptions>({"bench", "--attempts=7"}).attempts, 7);
  EXPECT_FALSE(Parse({"bench", "--attempts=0"}).ok());
  const auto both = Parse({"bench", "--attempts=7", "--streaming"});
  ASSERT_FALSE(both.ok());
  EXPECT_THAT(both.status().message(), HasSubstr("--attempts"));
}

TEST(OptionsTest, ClosedLoopsConcurrencyIsRefusedInTheOpenLoop) {
  const auto both = Parse({"bench", "--rate=5", "--concurrency=4"});
  EXPECT_EQ(both.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(both.status().message(), HasSubstr("--concurrency"));
  EXPECT_TRUE(Parse({"bench", "--rate=0", "--concurrency=4"}).ok());
  EXPECT_TRUE(Parse({"bench", "--rate=5"}).ok());
}

TEST(OptionsTest, UnknownFlagIsNamedBeforeOneThatIsMissing) {
  const auto up = Parse({"up", "--chekpoint=x"});
  EXPECT_THAT(up.status().message(), HasSubstr("--chekpoint"));
}

TEST(OptionsTest, UpHandsTheCoordinatorsLimitsOn) {
  const auto up = ParseAs<UpOptions>({"up", "--checkpoint=x", "--max-held-bytes=100000",
                                      "--max-connections=7", "--message-timeout-ms=20",
                                      "--stream-idle-timeout-ms=30", "--reply-timeout-ms=40"});
  for (const char* flag :
       {"--max-held-bytes=100000", "--max-connections=7", "--message-timeout-ms=20",
        "--stream-idle-timeout-ms=30", "--reply-timeout-ms=40"}) {
    EXPECT_THAT(up.coordinator_args, ::testing::Contains(flag));
    EXPECT_THAT(up.worker_args, ::testing::Not(::testing::Contains(flag)));
  }
}

TEST(OptionsTest, WatchTakesItsSecondsOrItsDefault) {
  EXPECT_FALSE(ParseAs<StatusOptions>({"status"}).watch);
  EXPECT_TRUE(ParseAs<StatusOptions>({"status", "--watch"}).watch);
  EXPECT_EQ(ParseAs<StatusOptions>({"status", "--watch"}).watch_interval_s, 1);
  EXPECT_TRUE(ParseAs<StatusOptions>({"status", "--watch=0.5"}).watch);
  EXPECT_EQ(ParseAs<StatusOptions>({"status", "--watch=0.5"}).watch_interval_s, 0.5);
}

TEST(OptionsTest, EnvironmentStandsInForAFlagAndYieldsToIt) {
  const ScopedVariable server("EPSERVE_SERVER", "unix:/tmp/x");
  const ScopedVariable tokens("EPSERVE_TOKENS", "12");
  EXPECT_EQ(ParseAs<BenchOptions>({"bench"}).server, "unix:/tmp/x");
  EXPECT_EQ(ParseAs<BenchOptions>({"bench"}).tokens, 12);
  EXPECT_EQ(ParseAs<BenchOptions>({"bench", "--tokens=3"}).tokens, 3);
}

TEST(OptionsTest, EnvironmentIsReadStrictlyAndForTheChosenSubcommandAlone) {
  const ScopedVariable dtype("EPSERVE_DTYPE", "fp8");
  EXPECT_FALSE(Parse({"bench"}).ok());
  EXPECT_TRUE(Parse({"status"}).ok());
  EXPECT_EQ(ParseAs<MakeCheckpointOptions>({"make-checkpoint", "--output=x"}).dtype, "fp8");
}

}  // namespace
}  // namespace epserve::client
