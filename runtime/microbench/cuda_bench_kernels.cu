#include <cuda_fp8.h>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/base/cuda_status.h"
#include "runtime/microbench/bench_random.h"
#include "runtime/microbench/cuda_bench_kernels.h"

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

template <typename Element>
__global__ void __launch_bounds__(256)
    StandInExpertsKernel(const __grid_constant__ StandInExpertsArgs args) {
  using V = Vector16<Element>;
  const std::int64_t num_vectors = args.hidden / V::kElements;
  const std::int64_t rows = args.expert_offset[args.num_local_experts];
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    int expert = 0;
    while (args.expert_offset[expert + 1] <= row) ++expert;
    const float factor = static_cast<float>(1.0 + static_cast<double>(args.first_expert + expert) /
                                                      static_cast<double>(args.num_experts));
    auto* at = static_cast<uint4*>(args.rows) + row * num_vectors;
    for (std::int64_t v = threadIdx.x; v < num_vectors; v += blockDim.x) {
      float values[V::kElements] = {};
      V::MultiplyAdd(at[v], factor, values);
      at[v] = V::Pack(values);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(256) FillRandomKernel(const FillRandomArgs args) {
  auto* const out = static_cast<Element*>(args.out);
  const std::uint64_t stride = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < args.count; i += stride) {
    out[i] = static_cast<Element>(RandomUnit(args.seed, i) * args.amplitude);
  }
}

}  // namespace

absl::Status LaunchPlainPush(const PlainPushArgs& args, int num_blocks, cudaStream_t stream) {
  PlainPushKernel<<<num_blocks, 1024, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

absl::Status LaunchStandInExperts(const StandInExpertsArgs& args, cudaStream_t stream) {
  constexpr int kBlocks = 132 * 8;
  switch (args.dtype) {
    case DataType::kBf16:
      StandInExpertsKernel<__nv_bfloat16><<<kBlocks, 256, 0, stream>>>(args);
      break;
    case DataType::kFp16:
      StandInExpertsKernel<__half><<<kBlocks, 256, 0, stream>>>(args);
      break;
    case DataType::kFp32:
      StandInExpertsKernel<float><<<kBlocks, 256, 0, stream>>>(args);
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat("stand-in experts: dtype ",
                                                     std::string(DataTypeName(args.dtype)),
                                                     " is none of fp32, fp16, bf16"));
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

absl::Status LaunchFillRandom(const FillRandomArgs& args, cudaStream_t stream) {
  constexpr int kBlocks = 132 * 8;
  switch (args.dtype) {
    case DataType::kBf16:
      FillRandomKernel<__nv_bfloat16><<<kBlocks, 256, 0, stream>>>(args);
      break;
    case DataType::kFp32:
      FillRandomKernel<float><<<kBlocks, 256, 0, stream>>>(args);
      break;
    case DataType::kFp8E4m3:
      FillRandomKernel<__nv_fp8_e4m3><<<kBlocks, 256, 0, stream>>>(args);
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat("fill random: dtype ",
                                                     std::string(DataTypeName(args.dtype)),
                                                     " is none of bf16, fp32, fp8"));
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
