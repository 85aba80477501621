// The activation between the two products of an expert: out = silu(gate) * up.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_SWIGLU_H_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_SWIGLU_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace epserve::runtime {

// gate_up [M, 2 * I] bf16, gate then up; out [M, I] bf16. I is a multiple of 8. M may be 0.
// Enqueues on `stream`; fp32 inside.
absl::Status LaunchSwiglu(const void* gate_up, void* out, std::int64_t num_rows,
                          std::int64_t intermediate, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_SWIGLU_H_
