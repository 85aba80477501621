// The experts' feed-forward on Tensor cores: bf16 weights and rows, fp32 accumulation, rows in
// expert-major order. The two products are cuBLAS grouped GEMMs with one group an expert, so that
// each expert's rows are multiplied as they lie, without padding.
//
// All memory is taken at Create. Used by one thread at a time; calls enqueue on the given stream.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_EXPERT_FFN_H_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_EXPERT_FFN_H_

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/cuda_memory.h"

namespace epserve::runtime {

// One layer's local experts in device memory.
struct CudaLayerWeights {
  const void* gate_up = nullptr;  // [E_local, 2 * I, H] bf16: gate rows, then up rows
  const void* down = nullptr;     // [E_local, H, I] bf16
};

class CudaExpertFfn {
 public:
  struct Config {
    std::int64_t hidden = 0;             // H, a multiple of 8
    std::int64_t intermediate = 0;       // I, a multiple of 8
    std::int64_t num_local_experts = 0;  // E_local
    std::int64_t max_rows = 0;           // M at most, over all local experts
  };

  static absl::StatusOr<std::unique_ptr<CudaExpertFfn>> Create(const Config& config);
  ~CudaExpertFfn();

  static std::uint64_t WorkspaceBytes(const Config& config);

  // rows_per_expert [E_local] on the host; inputs and outputs [M, H] bf16 on the device, expert-major.
  // `outputs` may be `inputs`: a row is read before it is overwritten.
  // INVALID_ARGUMENT: more rows than max_rows.
  absl::Status Run(const CudaLayerWeights& layer, std::span<const std::int64_t> rows_per_expert,
                   const void* inputs, void* outputs, cudaStream_t stream);

 private:
  struct Product;  // the arguments of one grouped GEMM

  explicit CudaExpertFfn(const Config& config) : config_(config) {}
  absl::Status Multiply(const Product& product, cudaStream_t stream);

  Config config_;
  cublasHandle_t handle_ = nullptr;
  DeviceBuffer gate_up_;        // [max_rows, 2 * I] bf16
  DeviceBuffer activated_;      // [max_rows, I] bf16
  DeviceBuffer pointers_;       // [2 products, 3 operands, E_local]
  PinnedBuffer host_pointers_;  // the same
  DeviceBuffer cublas_workspace_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_EXPERT_FFN_H_
