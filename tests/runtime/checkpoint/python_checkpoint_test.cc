// Reads checkpoints that Python's own safetensors package wrote (tests/support/make_checkpoint.py)
// and compares every weight, bit by bit, with what numpy decoded.
//
// EPSERVE_PYTHON names the interpreter. Without the package the test skips, unless
// EPSERVE_REQUIRE_PYTHON is set.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "runtime/checkpoint/checkpoint.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::ReadFileBytes;
using ::epserve::testing::TempDirectory;

struct Written {
  const char* layout;
  const char* dtype;
  int shards;
};

class PythonCheckpointTest : public ::testing::TestWithParam<Written> {
 protected:
  void SetUp() override {
    const char* python = std::getenv("EPSERVE_PYTHON");
    python_ = python == nullptr || *python == '\0' ? "python3" : python;
    if (std::system((python_ + " -c 'import numpy, safetensors' 2>/dev/null").c_str()) == 0) return;
    const std::string reason = python_ + " has no numpy or no safetensors package";
    if (std::getenv("EPSERVE_REQUIRE_PYTHON") != nullptr) FAIL() << reason;
    GTEST_SKIP() << reason;
  }

  // Compares the next values of expected.bin.
  void ExpectNext(const float* got, std::size_t count, const std::string& what) {
    ASSERT_LE(next_ + count * sizeof(float), expected_.size());
    EXPECT_EQ(std::memcmp(got, expected_.data() + next_, count * sizeof(float)), 0) << what;
    next_ += count * sizeof(float);
  }

  std::string python_;
  std::string expected_;
  std::size_t next_ = 0;
};

TEST_P(PythonCheckpointTest, EveryWeightIsReadBitByBit) {
  const Written& written = GetParam();
  TempDirectory directory;
  const std::string command = python_ + " " + MAKE_CHECKPOINT + " " + written.layout + " " +
                              written.dtype + " " + std::to_string(written.shards) + " " +
                              directory.path().string();
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
  expected_ = ReadFileBytes(directory.path() / "expected.bin");
  const auto checkpoint = Checkpoint::Open(directory.path().string());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelInfo& info = (*checkpoint)->info();
  EXPECT_EQ(info.architecture, written.layout);
  const auto weights = (*checkpoint)->LoadExpertRange(0, info.num_experts, nullptr);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto matrix = static_cast<std::size_t>(info.hidden * info.intermediate);
  for (std::size_t l = 0; l < info.layers.size(); ++l) {
    for (std::size_t e = 0; e < static_cast<std::size_t>(info.num_experts); ++e) {
      const std::string which = "layer " + std::to_string(l) + " expert " + std::to_string(e);
      ExpectNext(weights->layers[l].gate_up.data() + 2 * e * matrix, 2 * matrix, which);
      ExpectNext(weights->layers[l].down.data() + e * matrix, matrix, which);
    }
    const auto router = (*checkpoint)->LoadRouter(l);
    ASSERT_TRUE(router.ok()) << router.status();
    ExpectNext(router->gate.data(), router->gate.size(), "router");
    if (router->bias.size() > 0) ExpectNext(router->bias.data(), router->bias.size(), "bias");
  }
  EXPECT_EQ(next_, expected_.size());
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, PythonCheckpointTest,
    ::testing::Values(Written{"mixtral", "fp32", 1}, Written{"mixtral", "bf16", 3},
                      Written{"qwen3_moe", "bf16", 1}, Written{"qwen3_moe", "fp16", 2},
                      Written{"deepseek_v3", "bf16", 2}, Written{"deepseek_v3", "fp8", 1},
                      Written{"deepseek_v3", "fp8", 3}),
    [](const auto& info) {
      return std::string(info.param.layout) + "_" + info.param.dtype + "_" +
             std::to_string(info.param.shards);
    });

}  // namespace
}  // namespace epserve::runtime
