// The GPU that an engine is for, and what a process must set before it first asks for one. Internal
// to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_DEVICE_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include "absl/status/statusor.h"

namespace epserve::runtime {

// The visible GPU of that number. FAILED_PRECONDITION: there is none, or the kernels do not run on
// it.
absl::StatusOr<cudaDeviceProp> FindCudaDevice(int device);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_DEVICE_H_
