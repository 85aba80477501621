#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/engine/cuda_convert.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 4;               // a thread and turn
constexpr std::int64_t kMaxBlocks = 1024;  // enough to keep the memory of any GPU busy

template <typename T>
struct alignas(sizeof(T) * kElements) Piece {
  T values[kElements];
};

template <typename From, typename To>
__global__ void ConvertKernel(const Piece<From>* in, Piece<To>* out, std::int64_t num_pieces) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < num_pieces; i += step) {
    const Piece<From> piece = in[i];
    Piece<To> converted;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      converted.values[e] = static_cast<To>(static_cast<float>(piece.values[e]));
    }
    out[i] = converted;
  }
}

template <typename From, typename To>
absl::Status Launch(const void* in, void* out, std::int64_t count, cudaStream_t stream) {
  if (count % kElements != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("convert: count ", count, " is no multiple of ", kElements));
  }
  const std::int64_t num_pieces = count / kElements;
  if (num_pieces == 0) return absl::OkStatus();
  const auto blocks = static_cast<unsigned>(
      std::min<std::int64_t>((num_pieces + kThreads - 1) / kThreads, kMaxBlocks));
  ConvertKernel<From, To><<<blocks, kThreads, 0, stream>>>(
      static_cast<const Piece<From>*>(in), static_cast<Piece<To>*>(out), num_pieces);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

absl::Status RefuseType(DataType type) {
  return absl::InvalidArgumentError(
      absl::StrCat("convert: ", std::string(DataTypeName(type)), " is neither fp16 nor fp32"));
}

}  // namespace

absl::Status LoadConvertKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(ConvertKernel<float, __nv_bfloat16>));
  EPS_RETURN_IF_ERROR(LoadKernel(ConvertKernel<__half, __nv_bfloat16>));
  EPS_RETURN_IF_ERROR(LoadKernel(ConvertKernel<__nv_bfloat16, float>));
  return LoadKernel(ConvertKernel<__nv_bfloat16, __half>);
}

absl::Status LaunchToBf16(DataType from, const void* in, void* out, std::int64_t count,
                          cudaStream_t stream) {
  if (from == DataType::kFp32) return Launch<float, __nv_bfloat16>(in, out, count, stream);
  if (from == DataType::kFp16) return Launch<__half, __nv_bfloat16>(in, out, count, stream);
  return RefuseType(from);
}

absl::Status LaunchFromBf16(DataType to, const void* in, void* out, std::int64_t count,
                            cudaStream_t stream) {
  if (to == DataType::kFp32) return Launch<__nv_bfloat16, float>(in, out, count, stream);
  if (to == DataType::kFp16) return Launch<__nv_bfloat16, __half>(in, out, count, stream);
  return RefuseType(to);
}

}  // namespace epserve::runtime
