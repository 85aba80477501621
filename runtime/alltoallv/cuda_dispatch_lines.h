// The kernel of dispatch for few rows, behind LaunchDispatch.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_LINES_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_LINES_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

absl::Status LoadLineDispatchKernels();

// As LaunchDispatch, which has checked `args`; num_tokens is within the area's max_line_tokens.
cudaError_t LaunchLineDispatch(const CudaDispatchArgs& args, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_LINES_H_
