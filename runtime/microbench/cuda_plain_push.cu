#include "runtime/base/cuda_status.h"
#include "runtime/microbench/cuda_plain_push.h"

namespace epserve::runtime {
namespace {

__global__ void __launch_bounds__(1024, 1)
    PlainPushKernel(const __grid_constant__ PlainPushArgs args) {
  constexpr int kUnroll = 8;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  std::int64_t longest = 0;
  for (int r = 0; r < args.num_ranks; ++r) {
    longest = args.vectors[r] > longest ? args.vectors[r] : longest;
  }
  const auto* from = static_cast<const uint4*>(args.source);
  for (std::int64_t start = first; start < longest; start += kUnroll * stride) {
    uint4 piece[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (start + u * stride < longest) piece[u] = __ldcs(from + start + u * stride);
    }
    for (int i = 1; i < args.num_ranks; ++i) {
      const int r = (args.rank + i) % args.num_ranks;
      auto* to = static_cast<uint4*>(args.destination[r]);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (start + u * stride < args.vectors[r]) to[start + u * stride] = piece[u];
      }
    }
  }
}

}  // namespace

absl::Status LaunchPlainPush(const PlainPushArgs& args, int num_blocks, cudaStream_t stream) {
  PlainPushKernel<<<num_blocks, 1024, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
