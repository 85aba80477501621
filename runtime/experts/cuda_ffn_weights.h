// How one layer's local experts lie in device memory for the CUDA feed-forward, and the kernels
// that put checkpoint tensors there. One block of memory a layer:
//
//   gate_up  [E_local, 2 * I, H]  gate and up interleaved by kInterleave rows: gate 0-7, up 0-7,
//                                 gate 8-15, up 8-15, and so on, so that one thread of the first
//                                 product holds both factors of SwiGLU
//   down     [E_local, H, I]      as in the checkpoint
//   fp8 alone, fp32, one a block of kFp8Block x kFp8Block elements of the checkpoint's tensors:
//   gate_up_scales [E_local, ceil(I / 128), 2, ceil(H / 128)]  gate's, then up's
//   down_scales    [E_local, ceil(H / 128), ceil(I / 128)]
//
// Pure functions, and launchers that enqueue and return; safe from any thread.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_WEIGHTS_H_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_WEIGHTS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/base/dtype.h"

namespace epserve::runtime {

inline constexpr std::int64_t kFfnInterleave = 8;
inline constexpr std::int64_t kFfnFp8Block = 128;
inline constexpr std::int64_t kFfnGranularity = 16;  // H and I are multiples of it
inline constexpr int kMaxFfnExperts = 512;

struct CudaFfnShape {
  int num_local_experts = 0;           // E_local in [1, kMaxFfnExperts]
  std::int64_t hidden = 0;             // H, a multiple of kFfnGranularity
  std::int64_t intermediate = 0;       // I, a multiple of kFfnGranularity
  DataType weights = DataType::kBf16;  // held as: kBf16 or kFp8E4m3
};

// Byte offsets in a layer's block, which is aligned to 256 bytes (as cudaMalloc does).
struct CudaFfnLayout {
  std::uint64_t gate_up = 0;
  std::uint64_t down = 0;
  std::uint64_t gate_up_scales = 0;
  std::uint64_t down_scales = 0;
  std::uint64_t bytes = 0;  // of the whole block
};

// INVALID_ARGUMENT, naming what is out of bounds.
absl::Status CheckFfnShape(const CudaFfnShape& shape);

// REQUIRES: CheckFfnShape(shape) is OK.
CudaFfnLayout LayOutFfnWeights(const CudaFfnShape& shape);

enum class FfnProjection { kGate, kUp, kDown };

// One tensor of one expert as the checkpoint has it, in device (or mapped pinned host) memory.
struct CheckpointTensor {
  const void* data = nullptr;        // gate, up: [I, H]; down: [H, I]; row-major, 16-byte aligned
  DataType dtype = DataType::kBf16;  // kBf16, kFp16, kFp32, kFp8E4m3
  const float* scales = nullptr;     // kFp8E4m3 alone: [ceil(rows / 128), ceil(cols / 128)]
};

// Puts one tensor into its place in `layer` [out], a block of LayOutFfnWeights(shape).bytes.
// Held bf16: every checkpoint type is rounded to it (fp8 after its scale is applied).
// Held fp8: the checkpoint must be fp8; bytes and scales are kept as they are.
// Enqueues on `stream`; `tensor` may be reused once that has run. INVALID_ARGUMENT: anything else.
absl::Status PackFfnTensor(const CudaFfnShape& shape, int local_expert, FfnProjection projection,
                           const CheckpointTensor& tensor, std::byte* layer, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_WEIGHTS_H_
