#include <cuda_bf16.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_swiglu.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // bf16 values in 16 bytes

__global__ void __launch_bounds__(kThreads)
    SwigluKernel(const uint4* gate_up, uint4* out, std::int64_t num_rows, std::int64_t row_vectors) {
  const std::int64_t total = num_rows * row_vectors;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const std::int64_t row = i / row_vectors;
    const std::int64_t column = i - row * row_vectors;
    const uint4 gates = __ldcs(gate_up + 2 * row * row_vectors + column);
    const uint4 ups = __ldcs(gate_up + (2 * row + 1) * row_vectors + column);
    const auto* gate_pairs = reinterpret_cast<const __nv_bfloat162*>(&gates);
    const auto* up_pairs = reinterpret_cast<const __nv_bfloat162*>(&ups);
    uint4 result;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&result);
#pragma unroll
    for (int p = 0; p < kElements / 2; ++p) {
      const float2 g = __bfloat1622float2(gate_pairs[p]);
      const float2 u = __bfloat1622float2(up_pairs[p]);
      pairs[p] = __floats2bfloat162_rn(g.x / (1.0f + __expf(-g.x)) * u.x,
                                       g.y / (1.0f + __expf(-g.y)) * u.y);
    }
    out[i] = result;
  }
}

}  // namespace

absl::Status LaunchSwiglu(const void* gate_up, void* out, std::int64_t num_rows,
                          std::int64_t intermediate, cudaStream_t stream) {
  if (intermediate < kElements || intermediate % kElements != 0) {
    return absl::InvalidArgumentError(absl::StrCat("swiglu: intermediate ", intermediate,
                                                   " is not a positive multiple of ", kElements));
  }
  if (num_rows == 0) return absl::OkStatus();
  const std::int64_t vectors = num_rows * (intermediate / kElements);
  const auto blocks = static_cast<unsigned>(
      std::min<std::int64_t>((vectors + kThreads - 1) / kThreads, 132 * 16));
  SwigluKernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(gate_up),
                                                static_cast<uint4*>(out), num_rows,
                                                intermediate / kElements);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
