// Checkpoint tensors into the held layout. What is held in the checkpoint's own type is copied by
// the copy engine; the rest is converted by a kernel, eight elements a thread.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_ffn_weights.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;

struct ConvertArgs {
  const void* in;       // [rows, columns]
  const float* scales;  // [ceil(rows / 128), ceil(columns / 128)], or null
  __nv_bfloat16* out;   // first row
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t group_stride;  // rows of out from one group of kFfnInterleave rows to the next
};

__device__ float ToFloat(float value) { return value; }
__device__ float ToFloat(__half value) { return __half2float(value); }
__device__ float ToFloat(__nv_fp8_e4m3 value) { return static_cast<float>(value); }

template <typename In>
struct alignas(sizeof(In) * kVector > 16 ? 16 : sizeof(In) * kVector) Vector {
  In v[kVector];
};

template <typename In>
__global__ void __launch_bounds__(kThreads) ConvertKernel(const ConvertArgs args) {
  const std::int64_t vectors = args.columns / kVector;
  const std::int64_t scale_columns = (args.columns + kFfnFp8Block - 1) / kFfnFp8Block;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < args.rows * vectors; i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t row = i / vectors;
    const std::int64_t column = i % vectors * kVector;
    const auto in = static_cast<const Vector<In>*>(args.in)[i];
    const float scale =
        args.scales == nullptr
            ? 1.0f
            : args.scales[row / kFfnFp8Block * scale_columns + column / kFfnFp8Block];
    Vector<__nv_bfloat16> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) out.v[j] = __float2bfloat16(ToFloat(in.v[j]) * scale);
    const std::int64_t to = row / kFfnInterleave * args.group_stride + row % kFfnInterleave;
    *reinterpret_cast<Vector<__nv_bfloat16>*>(args.out + to * args.columns + column) = out;
  }
}

absl::Status Convert(const ConvertArgs& args, DataType from, cudaStream_t stream) {
  const std::int64_t wanted = (args.rows * args.columns / kVector + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(std::min<std::int64_t>(wanted, 4096));
  switch (from) {
    case DataType::kFp32:
      ConvertKernel<float><<<blocks, kThreads, 0, stream>>>(args);
      break;
    case DataType::kFp16:
      ConvertKernel<__half><<<blocks, kThreads, 0, stream>>>(args);
      break;
    default:
      ConvertKernel<__nv_fp8_e4m3><<<blocks, kThreads, 0, stream>>>(args);
      break;
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

absl::Status CheckPack(const CudaFfnShape& shape, int local_expert, const CheckpointTensor& tensor,
                       const std::byte* layer) {
  EPS_RETURN_IF_ERROR(CheckFfnShape(shape));
  if (local_expert < 0 || local_expert >= shape.num_local_experts) {
    return absl::InvalidArgumentError(absl::StrCat("pack weights: local_expert ", local_expert,
                                                   " is not in [0, ", shape.num_local_experts,
                                                   ")"));
  }
  if (layer == nullptr || tensor.data == nullptr ||
      reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) {
    return absl::InvalidArgumentError(
        "pack weights: layer or data is null, or data not 16-byte "
        "aligned");
  }
  const DataType from = tensor.dtype;
  if (from != DataType::kBf16 && from != DataType::kFp16 && from != DataType::kFp32 &&
      from != DataType::kFp8E4m3) {
    return absl::InvalidArgumentError(absl::StrCat(
        "pack weights: dtype ", std::string(DataTypeName(from)), " is no weight's type"));
  }
  if ((from == DataType::kFp8E4m3) != (tensor.scales != nullptr)) {
    return absl::InvalidArgumentError(
        absl::StrCat("pack weights: a ", std::string(DataTypeName(from)), " tensor ",
                     tensor.scales == nullptr ? "lacks" : "has", " scales; they belong to fp8"));
  }
  if (shape.weights == DataType::kFp8E4m3 && from != DataType::kFp8E4m3) {
    return absl::InvalidArgumentError(
        absl::StrCat("pack weights: a ", std::string(DataTypeName(from)),
                     " tensor cannot be held as fp8; hold this model's weights as bf16"));
  }
  return absl::OkStatus();
}

// `height` pieces of `width` bytes, from one another, to pieces that lie `pitch` bytes apart.
absl::Status CopyPieces(std::byte* to, std::uint64_t pitch, const void* from, std::uint64_t width,
                        std::uint64_t height, cudaStream_t stream) {
  EPS_CUDA_RETURN_IF_ERROR(
      cudaMemcpy2DAsync(to, pitch, from, width, width, height, cudaMemcpyDefault, stream));
  return absl::OkStatus();
}

}  // namespace

absl::Status PackFfnTensor(const CudaFfnShape& shape, int local_expert, FfnProjection projection,
                           const CheckpointTensor& tensor, std::byte* layer, cudaStream_t stream) {
  EPS_RETURN_IF_ERROR(CheckPack(shape, local_expert, tensor, layer));
  const CudaFfnLayout layout = LayOutFfnWeights(shape);
  const bool is_down = projection == FfnProjection::kDown;
  const int parts = is_down ? 1 : 2;  // tensors that are interleaved
  const int part = projection == FfnProjection::kUp ? 1 : 0;
  const std::int64_t rows = is_down ? shape.hidden : shape.intermediate;
  const std::int64_t columns = is_down ? shape.intermediate : shape.hidden;
  const std::uint64_t row_bytes = columns * DataTypeBytes(shape.weights);
  std::byte* const out = layer + (is_down ? layout.down : layout.gate_up) +
                         (local_expert * parts * rows + part * kFfnInterleave) * row_bytes;
  if (tensor.dtype != shape.weights) {
    return Convert({tensor.data, tensor.scales, reinterpret_cast<__nv_bfloat16*>(out), rows,
                    columns, kFfnInterleave * parts},
                   tensor.dtype, stream);
  }
  const std::uint64_t group_bytes = kFfnInterleave * row_bytes;
  EPS_RETURN_IF_ERROR(CopyPieces(out, parts * group_bytes, tensor.data, group_bytes,
                                 rows / kFfnInterleave, stream));
  if (tensor.scales == nullptr) return absl::OkStatus();
  const std::int64_t scale_rows = (rows + kFfnFp8Block - 1) / kFfnFp8Block;
  const std::uint64_t scale_bytes = (columns + kFfnFp8Block - 1) / kFfnFp8Block * sizeof(float);
  std::byte* const scales = layer + (is_down ? layout.down_scales : layout.gate_up_scales) +
                            (local_expert * parts * scale_rows + part) * scale_bytes;
  return CopyPieces(scales, parts * scale_bytes, tensor.scales, scale_bytes, scale_rows, stream);
}

}  // namespace epserve::runtime
