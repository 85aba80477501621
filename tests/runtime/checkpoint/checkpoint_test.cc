#include "runtime/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "runtime/checkpoint/tensor_table.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::ReferenceBias;
using ::epserve::testing::ReferenceGate;
using ::epserve::testing::ReferenceWeight;
using ::epserve::testing::TempDirectory;
using ::epserve::testing::WriteCheckpoint;
using ::testing::ElementsAre;

std::vector<CheckpointSpec> AllLayouts() {
  std::vector<CheckpointSpec> specs;
  for (const DataType dtype : {DataType::kFp32, DataType::kBf16, DataType::kFp16}) {
    CheckpointSpec mixtral{.layout = "mixtral", .dtype = dtype};
    CheckpointSpec qwen{.layout = "qwen3_moe", .dtype = dtype, .first_moe_layer = 1, .shards = 3};
    CheckpointSpec deepseek{.layout = "deepseek_v3", .dtype = dtype, .first_moe_layer = 2};
    deepseek.groups = 2;
    specs.insert(specs.end(), {mixtral, qwen, deepseek});
  }
  CheckpointSpec fp8{.layout = "deepseek_v3", .dtype = DataType::kFp8E4m3};
  fp8.hidden = 160;
  fp8.intermediate = 300;
  fp8.experts = 4;
  fp8.shards = 2;
  specs.push_back(fp8);
  return specs;
}

void ExpectNear(const float* got, const std::vector<double>& want, const std::string& what) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], 1e-6 * std::abs(want[i])) << what << " at " << i;
  }
}

TEST(CheckpointTest, EveryLayoutAndTypeLoadsItsWeights) {
  for (const CheckpointSpec& spec : AllLayouts()) {
    SCOPED_TRACE(spec.layout + " " + std::string(DataTypeName(spec.dtype)));
    TempDirectory directory;
    WriteCheckpoint(directory.path() / "c", spec);
    const auto checkpoint = Checkpoint::Open((directory.path() / "c").string());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const ModelInfo& info = (*checkpoint)->info();
    EXPECT_EQ(info.architecture, spec.layout);
    EXPECT_EQ(info.hidden, spec.hidden);
    EXPECT_EQ(info.intermediate, spec.intermediate);
    EXPECT_EQ(info.num_experts, spec.experts);
    EXPECT_EQ(info.topk, spec.topk);
    EXPECT_THAT(info.layers, ElementsAre(spec.first_moe_layer, spec.first_moe_layer + 1));
    EXPECT_TRUE(info.has_router);
    const std::int64_t first = 1;
    const std::int64_t num = spec.experts - 2;
    const auto weights = (*checkpoint)->LoadExpertRange(first, num, nullptr);
    ASSERT_TRUE(weights.ok()) << weights.status();
    const auto matrix = static_cast<std::size_t>(spec.hidden * spec.intermediate);
    for (std::size_t l = 0; l < 2; ++l) {
      const std::int64_t layer = info.layers[l];
      const LayerExperts& held = weights->layers[l];
      ASSERT_EQ(held.down.size(), static_cast<std::size_t>(num) * matrix);
      for (std::int64_t e = 0; e < num; ++e) {
        const float* gate = held.gate_up.data() + 2 * static_cast<std::size_t>(e) * matrix;
        ExpectNear(gate, ReferenceWeight(spec, layer, first + e, "gate"), "gate");
        ExpectNear(gate + matrix, ReferenceWeight(spec, layer, first + e, "up"), "up");
        ExpectNear(held.down.data() + static_cast<std::size_t>(e) * matrix,
                   ReferenceWeight(spec, layer, first + e, "down"), "down");
      }
      const auto router = (*checkpoint)->LoadRouter(l);
      ASSERT_TRUE(router.ok()) << router.status();
      ExpectNear(router->gate.data(), ReferenceGate(spec, layer), "router");
      if (spec.layout == "deepseek_v3") {
        ExpectNear(router->bias.data(), ReferenceBias(spec, layer), "bias");
      } else {
        EXPECT_EQ(router->bias.size(), 0u);
      }
    }
  }
}

TEST(CheckpointTest, ProgressGrowsToTheBytesOfTheRangeAlone) {
  TempDirectory directory;
  const CheckpointSpec spec{.layout = "qwen3_moe", .dtype = DataType::kBf16};
  WriteCheckpoint(directory.path() / "c", spec);
  const auto checkpoint = Checkpoint::Open((directory.path() / "c").string());
  ASSERT_TRUE(checkpoint.ok());
  std::uint64_t last = 0;
  std::uint64_t total = 0;
  const auto weights =
      (*checkpoint)->LoadExpertRange(2, 3, [&](std::uint64_t loaded, std::uint64_t all) {
        EXPECT_GE(loaded, last);
        last = loaded;
        total = all;
      });
  ASSERT_TRUE(weights.ok());
  const std::uint64_t want = 2u * 3u * 3u * 32u * 48u * 2u;  // layers, experts, matrices, bytes
  EXPECT_EQ(total, want);
  EXPECT_EQ(last, want);
}

// Other experts' bytes are not needed: the file may be cut behind those asked for.
TEST(CheckpointTest, OnlyTheRangesOwnBytesAreRead) {
  TempDirectory directory;
  const CheckpointSpec spec{.moe_layers = 1};
  WriteCheckpoint(directory.path() / "c", spec);
  const auto checkpoint = Checkpoint::Open((directory.path() / "c").string());
  ASSERT_TRUE(checkpoint.ok());
  const auto file = directory.path() / "c" / "model.safetensors";
  std::filesystem::resize_file(file, std::filesystem::file_size(file) / 2);
  EXPECT_TRUE((*checkpoint)->LoadExpertRange(0, 2, nullptr).ok());
  const auto rest = (*checkpoint)->LoadExpertRange(6, 2, nullptr);
  EXPECT_EQ(rest.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(rest.status().message()), ::testing::HasSubstr("model.safetensors"));
  EXPECT_THAT(std::string(rest.status().message()), ::testing::HasSubstr("experts.6.w1.weight"));
}

TEST(CheckpointTest, NoExpertsIsAnOrdinaryRange) {
  TempDirectory directory;
  WriteCheckpoint(directory.path() / "c", {});
  const auto checkpoint = Checkpoint::Open((directory.path() / "c").string());
  ASSERT_TRUE(checkpoint.ok());
  const auto weights = (*checkpoint)->LoadExpertRange(8, 0, nullptr);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->layers.size(), 2u);
}

TEST(CheckpointTest, CheckpointWithoutRouterSaysSo) {
  TempDirectory directory;
  WriteCheckpoint(directory.path() / "c", {.layout = "deepseek_v3", .router = false});
  const auto info = ReadModelInfo((directory.path() / "c").string());
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_FALSE(info->has_router);
}

TEST(CheckpointTest, FingerprintIsStableAndTellsModelsApart) {
  TempDirectory directory;
  std::vector<CheckpointSpec> specs = AllLayouts();
  CheckpointSpec wider = specs[0];
  wider.intermediate = 64;
  CheckpointSpec other_k = specs[0];
  other_k.topk = 3;
  CheckpointSpec tuned = specs[0];  // The same shape with other weights.
  tuned.seed = 2;
  specs.insert(specs.end(), {wider, other_k, tuned});
  std::vector<std::string> fingerprints;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const auto path = directory.path() / std::to_string(i);
    WriteCheckpoint(path, specs[i]);
    const auto info = ReadModelInfo(path.string());
    ASSERT_TRUE(info.ok()) << info.status();
    fingerprints.push_back(info->fingerprint);
    EXPECT_EQ(ReadModelInfo(path.string())->fingerprint, fingerprints.back());
  }
  // How the same tensors are spread over files is not part of it.
  CheckpointSpec sharded = specs[0];
  sharded.shards = 4;
  WriteCheckpoint(directory.path() / "sharded", sharded);
  EXPECT_EQ(ReadModelInfo((directory.path() / "sharded").string())->fingerprint, fingerprints[0]);
  std::sort(fingerprints.begin(), fingerprints.end());
  EXPECT_EQ(std::unique(fingerprints.begin(), fingerprints.end()), fingerprints.end());
}

// Each tensor's own bytes count, in one expert or router alone.
TEST(CheckpointTest, FingerprintTellsOneTensorsOtherContent) {
  TempDirectory directory;
  const CheckpointSpec spec{.layout = "deepseek_v3", .moe_layers = 1};
  WriteCheckpoint(directory.path() / "c", spec);
  const std::string path = (directory.path() / "c").string();
  const std::string file = path + "/model.safetensors";
  const auto table = TensorTable::Open(path);
  ASSERT_TRUE(table.ok()) << table.status();
  std::vector<std::string> fingerprints = {ReadModelInfo(path)->fingerprint};
  const std::string mlp = "model.layers." + std::to_string(spec.first_moe_layer) + ".mlp.";
  for (const std::string name :
       {"experts.0.gate_proj.weight", "experts.3.up_proj.weight", "experts.7.down_proj.weight",
        "gate.weight", "gate.e_score_correction_bias"}) {
    const TensorTable::Tensor* tensor = table->Find(mlp + name);
    ASSERT_NE(tensor, nullptr) << name;
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(static_cast<std::streamoff>(tensor->entry.offset + 5));
    stream.put('\x5a');
    ASSERT_TRUE(stream.flush().good());
    fingerprints.push_back(ReadModelInfo(path)->fingerprint);
  }
  std::sort(fingerprints.begin(), fingerprints.end());
  EXPECT_EQ(std::unique(fingerprints.begin(), fingerprints.end()), fingerprints.end());
}

TEST(CheckpointTest, DirectoryThatIsALinkIsOpenedAndLinksWithinItAreFollowed) {
  TempDirectory directory;
  WriteCheckpoint(directory.path() / "c", {});
  std::filesystem::create_directory_symlink(directory.path() / "c", directory.path() / "link");
  std::filesystem::rename(directory.path() / "c" / "model.safetensors",
                          directory.path() / "c" / "blob");
  std::filesystem::create_symlink("blob", directory.path() / "c" / "model.safetensors");
  EXPECT_TRUE(ReadModelInfo((directory.path() / "link").string()).ok());
}

}  // namespace
}  // namespace epserve::runtime
