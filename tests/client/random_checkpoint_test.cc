#include "client/command/random_checkpoint.h"

#include <signal.h>
#include <sys/resource.h>

#include <cmath>
#include <set>
#include <tuple>

#include "client/command/random_batch.h"
#include "client/cpp/reference_model.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/client/cpu_time.h"
#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

MakeCheckpointOptions Small(const std::string& directory) {
  MakeCheckpointOptions options;
  options.output_dir = directory + "/checkpoint";
  options.num_layers = 2;
  options.hidden = 136;  // Not a multiple of FP8's block.
  options.intermediate = 40;
  options.num_experts = 8;
  options.topk = 3;
  return options;
}

class EveryLayoutTest : public ::testing::TestWithParam<std::tuple<const char*, const char*, int>> {
};

TEST_P(EveryLayoutTest, IsReadByTheReferenceAndGivesSaneOutputs) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.architecture = std::get<0>(GetParam());
  options.dtype = std::get<1>(GetParam());
  options.num_shards = std::get<2>(GetParam());
  const auto summary = WriteRandomCheckpoint(options, nullptr);
  const bool fp8_elsewhere = options.dtype == "fp8" && options.architecture != "deepseek_v3";
  if (fp8_elsewhere) {
    EXPECT_EQ(summary.status().code(), absl::StatusCode::kInvalidArgument);
    return;
  }
  ASSERT_TRUE(summary.ok()) << summary.status();
  const auto model = ReferenceModel::Open(options.output_dir);
  ASSERT_TRUE(model.ok()) << model.status();
  const ReferenceConfig& config = (*model)->config();
  EXPECT_TRUE((*model)->has_router());
  EXPECT_EQ(config.layers.size(), 2u);
  RandomBatch random(7, options.hidden, options.num_experts, options.topk);
  const std::vector<double> x = ToDoubles(random.HiddenStates(ElementType::kF32, 16));
  for (const std::int64_t layer : config.layers) {
    const auto routes = (*model)->Route(layer, x);
    ASSERT_TRUE(routes.ok()) << routes.status();
    std::set<std::int64_t> used;
    for (const TokenRoute& route : *routes) used.insert(route.ids.begin(), route.ids.end());
    EXPECT_GT(used.size(), 3u) << "random routers spread tokens over experts";
    const auto y = (*model)->Compute(layer, x, random.Ids(16), random.Weights(16));
    ASSERT_TRUE(y.ok()) << y.status();
    double square = 0;
    for (const double value : *y) square += value * value;
    const double rms = std::sqrt(square / static_cast<double>(y->size()));
    EXPECT_GT(rms, 0.03);
    EXPECT_LT(rms, 3.0);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, EveryLayoutTest,
    ::testing::Combine(::testing::Values("mixtral", "qwen3_moe", "deepseek_v3"),
                       ::testing::Values("bf16", "fp16", "fp32", "fp8"), ::testing::Values(1, 3)));

TEST(RandomCheckpointTest, SameSeedGivesTheSameBytesAndAnotherDoesNot) {
  const TestDirectory a;
  const TestDirectory b;
  const TestDirectory c;
  MakeCheckpointOptions options = Small(a.path());
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  options.output_dir = Small(b.path()).output_dir;
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  options.output_dir = Small(c.path()).output_dir;
  options.seed = 2;
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  const std::string name = "checkpoint/model.safetensors";
  EXPECT_EQ(a.Read(name), b.Read(name));
  EXPECT_NE(a.Read(name), c.Read(name));
}

TEST(RandomCheckpointTest, IndexNamesEveryTensorAndTheTotalSize) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.num_shards = 5;
  const auto summary = WriteRandomCheckpoint(options, nullptr);
  ASSERT_TRUE(summary.ok()) << summary.status();
  const auto index =
      nlohmann::json::parse(directory.Read("checkpoint/model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], summary->bytes);
  EXPECT_EQ(index["weight_map"].size(), static_cast<std::size_t>(summary->num_tensors));
  std::set<std::string> files;
  for (const auto& item : index["weight_map"].items()) files.insert(item.value());
  EXPECT_EQ(files.size(), 5u);
  EXPECT_EQ(*files.begin(), "model-00001-of-00005.safetensors");
}

TEST(RandomCheckpointTest, DirectoryThatIsNotEmptyIsLeftAloneWithoutForce) {
  const TestDirectory directory;
  directory.Write("notes.txt", "keep me");
  MakeCheckpointOptions options = Small(directory.path());
  options.output_dir = directory.path();
  const auto refused = WriteRandomCheckpoint(options, nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("--force"));
  EXPECT_FALSE(std::filesystem::exists(directory.File("config.json")));
  options.force = true;
  options.num_shards = 2;
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  // Another layout over it leaves no shard of the old one, and no other file is touched.
  options.num_shards = 1;
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  EXPECT_FALSE(std::filesystem::exists(directory.File("model.safetensors.index.json")));
  EXPECT_FALSE(std::filesystem::exists(directory.File("model-00001-of-00002.safetensors")));
  EXPECT_EQ(directory.Read("notes.txt"), "keep me");
  EXPECT_TRUE(ReferenceModel::Open(directory.path()).ok());
}

TEST(RandomCheckpointTest, ForceRemovesWhatARunThatWasKilledLeft) {
  const TestDirectory directory;
  for (const char* name : {"model.safetensors.partial-17-0",
                           "model-00001-of-00003.safetensors.partial-123-0", "model.partial"}) {
    directory.Write(name, "half");
  }
  MakeCheckpointOptions options = Small(directory.path());
  options.output_dir = directory.path();
  options.force = true;
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  std::set<std::string> left;
  for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
    left.insert(entry.path().filename());
  }
  EXPECT_THAT(left, ElementsAre("config.json", "model.partial", "model.safetensors"));
}

// Also the index: four times the tensors take about four times as long.
TEST(RandomCheckpointTest, TimeIsLinearInTheNumberOfTensors) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.hidden = options.intermediate = 1;
  options.num_experts = 2600;
  options.num_shards = 2;
  options.force = true;
  const auto seconds = [&](std::int64_t num_layers) {
    options.num_layers = num_layers;
    return LeastCpuSeconds([&] { EXPECT_TRUE(WriteRandomCheckpoint(options, nullptr).ok()); });
  };
  EXPECT_LT(seconds(4), 7 * seconds(1));
}

TEST(RandomCheckpointTest, WithoutRouterThereIsNone) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.router = false;
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  const auto model = ReferenceModel::Open(options.output_dir);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_FALSE((*model)->has_router());
}

TEST(RandomCheckpointTest, ProgressEndsAtTheTotal) {
  const TestDirectory directory;
  std::uint64_t last = 0;
  std::uint64_t total = 0;
  const auto summary =
      WriteRandomCheckpoint(Small(directory.path()), [&](std::uint64_t written, std::uint64_t of) {
        EXPECT_GT(written, last);
        last = written;
        total = of;
      });
  ASSERT_TRUE(summary.ok());
  EXPECT_EQ(last, summary->bytes);
  EXPECT_EQ(total, summary->bytes);
}

// Lets this process write no file beyond `bytes`, for the length of a test.
class ScopedFileLimit {
 public:
  explicit ScopedFileLimit(rlim_t bytes) : handler_(signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    rlimit limit = before_;
    limit.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~ScopedFileLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

TEST(RandomCheckpointTest, FailureLeavesNothingOfWhatItMade) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.output_dir = directory.File("new/checkpoint");
  options.num_shards = 5;
  options.num_experts = 4;
  // Room for some shards, which hold a different number of bytes each, and not for all.
  ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
  std::set<std::uintmax_t> sizes;
  for (const auto& entry : std::filesystem::directory_iterator(options.output_dir)) {
    if (entry.path().extension() == ".safetensors") sizes.insert(entry.file_size());
  }
  ASSERT_GT(sizes.size(), 1u);
  std::filesystem::remove_all(directory.File("new"));
  for (const std::uintmax_t bytes : {std::uintmax_t{1000}, *sizes.rbegin() - 1}) {
    const ScopedFileLimit limit(bytes);
    const auto failed = WriteRandomCheckpoint(options, nullptr);
    EXPECT_EQ(failed.status().code(), absl::StatusCode::kResourceExhausted) << failed.status();
    EXPECT_THAT(std::string(failed.status().message()), HasSubstr("make room"));
    EXPECT_FALSE(std::filesystem::exists(directory.File("new"))) << bytes;
  }
  // A directory that was there before stays, empty as it was.
  std::filesystem::create_directories(options.output_dir);
  const ScopedFileLimit limit(1000);
  EXPECT_FALSE(WriteRandomCheckpoint(options, nullptr).ok());
  EXPECT_TRUE(std::filesystem::is_empty(options.output_dir));
}

TEST(RandomCheckpointTest, ImpossibleShapesAreRefused) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.topk = 9;
  EXPECT_EQ(WriteRandomCheckpoint(options, nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
  options = Small(directory.path());
  options.num_shards = 10000;
  EXPECT_EQ(WriteRandomCheckpoint(options, nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(RandomCheckpointTest, DeepseekOfOneExpertIsRefusedAsTheServiceWould) {
  const TestDirectory directory;
  MakeCheckpointOptions options = Small(directory.path());
  options.architecture = "deepseek_v3";
  options.num_experts = options.topk = 1;
  const absl::Status refused = WriteRandomCheckpoint(options, nullptr).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("--experts 1"));
  EXPECT_FALSE(std::filesystem::exists(options.output_dir));
  options.architecture = "mixtral";
  EXPECT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
}

TEST(RandomCheckpointTest, DeepseekGroupsLeaveEnoughExpertsForTopk) {
  for (const auto& [experts, topk] : std::vector<std::pair<int, int>>{
           {8, 8}, {7, 5}, {6, 4}, {16, 1}, {2, 1}, {3, 3}, {64, 33}}) {
    const TestDirectory directory;
    MakeCheckpointOptions options = Small(directory.path());
    options.architecture = "deepseek_v3";
    options.num_layers = 1;
    options.hidden = 8;
    options.intermediate = 4;
    options.num_experts = experts;
    options.topk = topk;
    ASSERT_TRUE(WriteRandomCheckpoint(options, nullptr).ok());
    const auto model = ReferenceModel::Open(options.output_dir);
    EXPECT_TRUE(model.ok()) << experts << " experts, top-" << topk << ": " << model.status();
  }
}

}  // namespace
}  // namespace epserve::client
