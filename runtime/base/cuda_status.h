// CUDA errors as Status: the call, the error and the place. Out of memory is RESOURCE_EXHAUSTED,
// everything else INTERNAL. The runtime's sticky last error is cleared, so that a handled failure
// does not show up again in an unrelated later check.
#ifndef EPSERVE_RUNTIME_BASE_CUDA_STATUS_H_
#define EPSERVE_RUNTIME_BASE_CUDA_STATUS_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {

inline absl::Status CudaStatus(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  const std::string message =
      absl::StrCat("cuda: ", call, " failed: ", cudaGetErrorName(error), " (",
                   cudaGetErrorString(error), ") at ", file, ":", line);
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(message)
                                            : absl::InternalError(message);
}

// Driver-API results carry no text of their own here: the name's number is what the headers list.
inline absl::Status DriverStatus(CUresult result, const char* call, const char* file, int line) {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const std::string message = absl::StrCat("cuda: ", call, " failed: CUresult ",
                                           static_cast<int>(result), " at ", file, ":", line);
  return result == CUDA_ERROR_OUT_OF_MEMORY ? absl::ResourceExhaustedError(message)
                                            : absl::InternalError(message);
}

// Loads a kernel into the current device; looking at its attributes does that.
template <typename Kernel>
absl::Status LoadKernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return CudaStatus(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
                    "cudaFuncGetAttributes", __FILE__, __LINE__);
}

}  // namespace epserve::runtime

#define EPS_CUDA_RETURN_IF_ERROR(call) \
  EPS_RETURN_IF_ERROR(::epserve::runtime::CudaStatus((call), #call, __FILE__, __LINE__))
#define EPS_DRIVER_RETURN_IF_ERROR(call) \
  EPS_RETURN_IF_ERROR(::epserve::runtime::DriverStatus((call), #call, __FILE__, __LINE__))

#endif  // EPSERVE_RUNTIME_BASE_CUDA_STATUS_H_
