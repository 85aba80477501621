// Combine for many rows; see cuda_combine.cu, which chooses it.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_STREAM_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_STREAM_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

absl::Status LoadStreamCombineKernels();

// REQUIRES: what LaunchCombine has checked, and roles that are not merged.
template <typename Element>
cudaError_t LaunchStreamCombine(const CudaCombineArgs& args, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_STREAM_H_
