// The experts' feed-forward on Tensor cores: y = down(silu(gate(x)) * up(x)), grouped over the
// local experts of expert-major rows, with fp32 accumulation. The number of rows of each expert is
// read on the device, so a batch is enqueued without knowing it. A row's result depends neither on
// the other rows nor on timing.
//
// Weights are held as cuda_ffn_weights.h lays them out. bf16 weights meet bf16 rows. fp8 weights:
// the Hopper kernel casts rows to e4m3, with one scale for each row and 128 columns, and promotes
// its partial sums to fp32 every 128 of K; the portable kernel widens the weights instead.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_EXPERT_FFN_H_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_EXPERT_FFN_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/experts/cuda_ffn_weights.h"

namespace epserve::runtime {

enum class FfnKernel {
  kAuto,      // kHopper where the device is one, else kPortable
  kHopper,    // TMA and wgmma: compute capability 9.0 alone
  kPortable,  // mma.sync: 9.0 and later
};

struct CudaExpertFfnConfig {
  CudaFfnShape shape;
  std::int64_t max_rows = 0;  // M at most, in [1, 2^31)
  FfnKernel kernel = FfnKernel::kAuto;
};

// One slot's feed-forward: it has a workspace, so its calls must be ordered (one stream, or
// events). Nothing is allocated after Create, and Run can be captured into a CUDA graph.
class CudaExpertFfn {
 public:
  // On the current device. INVALID_ARGUMENT: the configuration; FAILED_PRECONDITION: the device
  // has not what `kernel` needs; RESOURCE_EXHAUSTED: no memory for the workspace.
  static absl::StatusOr<std::unique_ptr<CudaExpertFfn>> Create(const CudaExpertFfnConfig& config);
  virtual ~CudaExpertFfn() = default;

  // What Create takes from the device. `kernel` is ignored: it is the larger of both.
  // REQUIRES: a valid configuration.
  static std::uint64_t WorkspaceBytes(const CudaExpertFfnConfig& config);

  // Enqueues on `stream` and returns before it runs.
  //   layer          [in]  block of LayOutFfnWeights(shape).bytes, filled by PackFfnTensor
  //   x              [in]  [M, H] bf16, expert-major, in a buffer of max_rows rows: rows at and
  //                        past M may be read and change nothing
  //   expert_offset  [in]  [E_local + 1] i32, device: first row of each expert, from 0, never
  //                        falling; the last is M, at most max_rows
  //   y              [out] [M, H] bf16, overwritten; rows at and past M are left alone
  // All in device memory, x and y 16-byte aligned and apart. INVALID_ARGUMENT: null or misaligned.
  virtual absl::Status Run(const std::byte* layer, const void* x, const std::int32_t* expert_offset,
                           void* y, cudaStream_t stream) = 0;

  virtual std::uint64_t workspace_bytes() const = 0;
  // For logs and reports: "hopper-wgmma-bf16", "hopper-wgmma-fp8", "portable-mma-bf16", ...
  virtual std::string_view kernel_name() const = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_EXPERT_FFN_H_
