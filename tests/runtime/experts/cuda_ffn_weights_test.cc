// The part of the CUDA feed-forward that needs no GPU: sizes, and what is refused.
#include "runtime/experts/cuda_ffn_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "runtime/experts/cuda_expert_ffn.h"

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

constexpr CudaFfnShape kShape = {4, 48, 32, DataType::kBf16};

void ExpectInvalid(const absl::Status& status, const std::string& text) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

TEST(FfnWeightsLayoutTest, Bf16BlockIsTheThreeMatricesOfEveryExpert) {
  const CudaFfnLayout layout = LayOutFfnWeights(kShape);
  EXPECT_EQ(layout.gate_up, 0u);
  EXPECT_EQ(layout.down, 4u * 2 * 32 * 48 * 2);
  EXPECT_EQ(layout.bytes, 4u * 3 * 32 * 48 * 2);
}

TEST(FfnWeightsLayoutTest, Fp8BlockHasAScaleForEvery128By128EvenWhereTheLastIsPartial) {
  const CudaFfnLayout layout = LayOutFfnWeights({3, 272, 144, DataType::kFp8E4m3});
  EXPECT_EQ(layout.down, 3u * 2 * 144 * 272);
  EXPECT_GE(layout.gate_up_scales, layout.down + 3u * 144 * 272);
  EXPECT_GE(layout.down_scales, layout.gate_up_scales + 3u * 2 * 2 * 3 * 4);
  EXPECT_GE(layout.bytes, layout.down_scales + 3u * 3 * 2 * 4);
  for (const std::uint64_t at : {layout.down, layout.gate_up_scales, layout.down_scales}) {
    EXPECT_EQ(at % 256, 0u);
  }
}

TEST(CheckFfnShapeTest, ShapesOutOfBoundsAreRefusedByName) {
  EXPECT_TRUE(CheckFfnShape(kShape).ok());
  EXPECT_TRUE(CheckFfnShape({512, 7168, 2048, DataType::kFp8E4m3}).ok());
  ExpectInvalid(CheckFfnShape({0, 48, 32}), "num_local_experts 0 is not in [1, 512]");
  ExpectInvalid(CheckFfnShape({513, 48, 32}), "num_local_experts 513");
  ExpectInvalid(CheckFfnShape({4, 40, 32}), "hidden 40 is no multiple of 16");
  ExpectInvalid(CheckFfnShape({4, 48, 0}), "intermediate 0");
  ExpectInvalid(CheckFfnShape({4, 48, 24}), "intermediate 24");
  ExpectInvalid(CheckFfnShape({4, 2 << 20, 32}), "hidden 2097152");
  ExpectInvalid(CheckFfnShape({4, 48, 32, DataType::kFp16}), "weights fp16 are not held");
}

TEST(PackFfnTensorTest, ArgumentsThatDoNotFitAreRefused) {
  alignas(256) static std::byte memory[256];
  const auto pack = [&](const CudaFfnShape& shape, int expert, const CheckpointTensor& tensor) {
    return PackFfnTensor(shape, expert, FfnProjection::kUp, tensor, memory, nullptr);
  };
  const CudaFfnShape fp8 = {4, 48, 32, DataType::kFp8E4m3};
  const auto* scales = reinterpret_cast<const float*>(memory);
  ExpectInvalid(pack({4, 40, 32}, 0, {memory, DataType::kBf16}), "hidden 40");
  ExpectInvalid(pack(kShape, 4, {memory, DataType::kBf16}), "local_expert 4 is not in [0, 4)");
  ExpectInvalid(pack(kShape, -1, {memory, DataType::kBf16}), "local_expert -1");
  ExpectInvalid(pack(kShape, 0, {nullptr, DataType::kBf16}), "null");
  ExpectInvalid(pack(kShape, 0, {memory + 8, DataType::kBf16}), "16-byte aligned");
  ExpectInvalid(pack(kShape, 0, {memory, DataType::kInt32}), "int32 is no weight's type");
  ExpectInvalid(pack(kShape, 0, {memory, DataType::kFp8E4m3}), "lacks scales");
  ExpectInvalid(pack(kShape, 0, {memory, DataType::kBf16, scales}), "has scales");
  ExpectInvalid(pack(fp8, 0, {memory, DataType::kFp32}), "cannot be held as fp8");
}

TEST(CudaExpertFfnConfigTest, RowsOutOfBoundsAreRefusedBeforeTheDeviceIsAsked) {
  for (const std::int64_t rows : {std::int64_t{0}, std::int64_t{1} << 31}) {
    ExpectInvalid(CudaExpertFfn::Create({kShape, rows}).status(),
                  "max_rows " + std::to_string(rows) + " is not in [1,");
  }
}

TEST(CudaExpertFfnConfigTest, WorkspaceHoldsWhatIsBetweenTheProducts) {
  CudaExpertFfnConfig config = {{4, 256, 512, DataType::kBf16}, 1000};
  EXPECT_EQ(CudaExpertFfn::WorkspaceBytes(config), 1000u * 512 * 2);
  config.shape.weights = DataType::kFp8E4m3;
  EXPECT_GE(CudaExpertFfn::WorkspaceBytes(config), 1000u * (512 * 2 + 256 + (2 + 4) * 4));
}

}  // namespace
}  // namespace epserve::runtime
