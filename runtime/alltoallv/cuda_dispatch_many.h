// The kernel of dispatch for many rows, behind LaunchDispatch.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_MANY_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_MANY_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

absl::Status LoadManyDispatchKernels();

// As LaunchDispatch, which has checked `args`; the area's sources send no lines.
cudaError_t LaunchManyDispatch(const CudaDispatchArgs& args, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_MANY_H_
