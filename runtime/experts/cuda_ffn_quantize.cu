// Casts rows to e4m3 with one scale for each row and kBlock columns.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "runtime/base/cuda_fp8.cuh"
#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_ffn_device.cuh"
#include "runtime/experts/cuda_ffn_kernels.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;  // that share a block of columns
constexpr int kVector = 8;  // elements a lane
constexpr int kBlock = kLanes * kVector;
static_assert(kBlock == 128, "the weights' scales are of 128 columns too");

__global__ void __launch_bounds__(kThreads) QuantizeKernel(const FfnQuantizeArgs args) {
  const int rows = min(*args.num_rows, args.max_rows);
  const int blocks = (args.columns + kBlock - 1) / kBlock;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t first =
      (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads / kLanes;
  const std::int64_t count = static_cast<std::int64_t>(rows) * blocks;
  // Both halves of a warp go round equally often: they shuffle together.
  for (std::int64_t start = first - first % 2; start < count; start += stride) {
    const std::int64_t i = start + first % 2;
    const std::int64_t row = i / blocks;
    const int block = static_cast<int>(i % blocks);
    const int column = block * kBlock + lane * kVector;
    const bool mine = i < count && column < args.columns;
    const std::int64_t at = (row * args.columns + column) / kVector;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (mine) packed = static_cast<const uint4*>(args.in)[at];
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
    float2 v[kVector / 2];
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector / 2; ++j) {
      v[j] = __bfloat1622float2(pairs[j]);
      largest = fmaxf(largest, fmaxf(fabsf(v[j].x), fabsf(v[j].y)));
    }
#pragma unroll
    for (int to = kLanes / 2; to > 0; to /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, to));
    }
    const float scale = Fp8Scale(largest);
    const float inverse = 1.0f / scale;
    uint2 out;
    auto* bytes = reinterpret_cast<__nv_fp8x2_storage_t*>(&out);
#pragma unroll
    for (int j = 0; j < kVector / 2; ++j) {
      bytes[j] = __nv_cvt_float2_to_fp8x2(make_float2(v[j].x * inverse, v[j].y * inverse),
                                          __NV_SATFINITE, __NV_E4M3);
    }
    if (mine) static_cast<uint2*>(args.out)[at] = out;
    if (i < count && lane == 0) {
      args.scales[static_cast<std::int64_t>(block) * args.max_rows + row] = scale;
    }
  }
}

}  // namespace

absl::Status PrepareFfnQuantize() { return LoadKernel(QuantizeKernel); }

absl::Status LaunchFfnQuantize(const FfnQuantizeArgs& args, int num_blocks, cudaStream_t stream) {
  QuantizeKernel<<<num_blocks, kThreads, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
