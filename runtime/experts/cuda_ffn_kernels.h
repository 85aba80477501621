// Launchers of the feed-forward's kernels; cuda_expert_ffn.cc strings them together. Each enqueues
// on `stream` and returns. Pointers are device memory.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_KERNELS_H_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_KERNELS_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/dtype.h"

namespace epserve::runtime {

// One grouped product: out[row] = a[row] * weights[expert of row]^T, the gate and up product with
// SwiGLU on the way out.
struct FfnProductArgs {
  const std::int32_t* expert_offset = nullptr;  // [E_local + 1]
  int num_experts = 0;
  int max_rows = 0;
  int weight_rows = 0;  // N of one expert: 2 * I (interleaved) or H
  int k = 0;            // H or I
  int out_columns = 0;  // I or H
  // bf16; but e4m3 are a of hopper's fp8 products, and out of the first of them.
  const void* a = nullptr;        // [max_rows, K]
  const void* weights = nullptr;  // [E_local, N, K]
  void* out = nullptr;            // [max_rows, out_columns]
  // fp8 weights alone:
  const float* weight_scales = nullptr;  // as cuda_ffn_weights.h has them
  // e4m3 rows alone, one for each row and 128 columns:
  const float* row_scales = nullptr;  // [ceil(K / 128), max_rows]
  float* out_scales = nullptr;        // [ceil(out_columns / 128), max_rows]
};

// Rows are copied by boxes of 64, weights by boxes of 128 rows.
inline constexpr int kHopperRowBox = 64;
inline constexpr int kHopperWeightBox = 128;

// Blocks that fill the device. Raises the kernels' limits of shared memory.
absl::StatusOr<int> PrepareHopperFfn(DataType weights);
// `down`: the second product. Maps: boxes of 128 bytes of K, swizzled by 128 bytes.
absl::Status LaunchHopperFfn(DataType weights, bool down, const FfnProductArgs& args,
                             const CUtensorMap& a, const CUtensorMap& w, int num_blocks,
                             cudaStream_t stream);

absl::StatusOr<int> PreparePortableFfn(DataType weights);
absl::Status LaunchPortableFfn(DataType weights, bool down, const FfnProductArgs& args,
                               int num_blocks, cudaStream_t stream);

struct FfnQuantizeArgs {
  const void* in = nullptr;                // [max_rows, columns] bf16
  void* out = nullptr;                     // [max_rows, columns] e4m3
  float* scales = nullptr;                 // [ceil(columns / 128), max_rows]: in = out * scale
  const std::int32_t* num_rows = nullptr;  // the last of expert_offset
  int max_rows = 0;
  int columns = 0;  // a multiple of 16
};
absl::Status PrepareFfnQuantize();
absl::Status LaunchFfnQuantize(const FfnQuantizeArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_KERNELS_H_
