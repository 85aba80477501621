#include "runtime/experts/cuda_ffn_weights.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

std::uint64_t CeilDiv(std::uint64_t value, std::uint64_t by) { return (value + by - 1) / by; }

absl::Status CheckDimension(const char* name, std::int64_t value) {
  constexpr std::int64_t kLargest = 1 << 20;
  static_assert(kMaxFfnExperts * 2 * kLargest <= INT32_MAX,
                "the kernels count the weight rows of all experts in 32 bits");
  if (value < kFfnGranularity || value > kLargest || value % kFfnGranularity != 0) {
    return absl::InvalidArgumentError(absl::StrCat("expert ffn: ", name, " ", value,
                                                   " is no multiple of ", kFfnGranularity, " in [",
                                                   kFfnGranularity, ", ", kLargest, "]"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckFfnShape(const CudaFfnShape& shape) {
  if (shape.num_local_experts < 1 || shape.num_local_experts > kMaxFfnExperts) {
    return absl::InvalidArgumentError(absl::StrCat("expert ffn: num_local_experts ",
                                                   shape.num_local_experts, " is not in [1, ",
                                                   kMaxFfnExperts, "]"));
  }
  const absl::Status hidden = CheckDimension("hidden", shape.hidden);
  if (!hidden.ok()) return hidden;
  const absl::Status intermediate = CheckDimension("intermediate", shape.intermediate);
  if (!intermediate.ok()) return intermediate;
  if (shape.weights != DataType::kBf16 && shape.weights != DataType::kFp8E4m3) {
    return absl::InvalidArgumentError(absl::StrCat("expert ffn: weights ",
                                                   std::string(DataTypeName(shape.weights)),
                                                   " are not held; they are held as bf16 or fp8"));
  }
  return absl::OkStatus();
}

CudaFfnLayout LayOutFfnWeights(const CudaFfnShape& shape) {
  constexpr std::uint64_t kAlignment = 256;
  const auto aligned = [](std::uint64_t bytes) { return CeilDiv(bytes, kAlignment) * kAlignment; };
  const auto experts = static_cast<std::uint64_t>(shape.num_local_experts);
  const auto matrix =
      static_cast<std::uint64_t>(shape.hidden * shape.intermediate) * DataTypeBytes(shape.weights);
  CudaFfnLayout layout;
  layout.down = aligned(experts * 2 * matrix);
  layout.gate_up_scales = layout.down + aligned(experts * matrix);
  layout.down_scales = layout.gate_up_scales;
  layout.bytes = layout.gate_up_scales;
  if (shape.weights == DataType::kFp8E4m3) {
    const std::uint64_t scales =
        CeilDiv(static_cast<std::uint64_t>(shape.hidden), kFfnFp8Block) *
        CeilDiv(static_cast<std::uint64_t>(shape.intermediate), kFfnFp8Block) * sizeof(float);
    layout.down_scales += aligned(experts * 2 * scales);
    layout.bytes = layout.down_scales + aligned(experts * scales);
  }
  return layout;
}

}  // namespace epserve::runtime
