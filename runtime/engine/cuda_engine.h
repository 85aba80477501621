// The engine of the cuda and nccl backends: one GPU that holds its experts' weights in bf16 or fp8,
// computes on Tensor cores in bf16 with fp32 sums, and exchanges rows with its peers by one-sided
// kernels (cuda) or by NCCL's sends and receives (nccl).
// Rows travel as bf16 (or fp8): FP16 and FP32 rows are converted where they come in and go out.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_ENGINE_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_ENGINE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "runtime/engine/engine.h"

namespace epserve::runtime {

// GPUs that this process sees; 0 where there is no driver. Sets up the process for CUDA, so it
// comes before any other use of it, from the only thread.
int NumCudaDevices();

// Errors as CreateHostEngine's, and FAILED_PRECONDITION: no such GPU, or one that is too old.
absl::StatusOr<std::unique_ptr<Engine>> CreateCudaEngine(const EngineOptions& options);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_ENGINE_H_
