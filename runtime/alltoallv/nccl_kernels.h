// Launchers of the small kernels that the nccl backend has of its own; rows are packed, gathered
// and summed by the kernels of cuda_kernels.h. Each enqueues and returns; all can be captured in a
// graph.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_NCCL_KERNELS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_NCCL_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace epserve::runtime {

// Loads this header's kernels into the current device, before the first batch.
absl::Status LoadNcclKernels();

// Adds one to a word of host memory that the device can write, once the stream has come here. Only
// one stream may count in a word.
absl::Status LaunchCount(std::uint64_t* word, cudaStream_t stream);

// counts[r] = rows that dispatch placed for rank r: the largest of send_position[:, r], plus one.
// send_position i32 [T, R], as CudaDispatchArgs has it; counts i32 [R], overwritten.
absl::Status LaunchRowsToRank(const std::int32_t* send_position, std::int64_t num_tokens,
                              int num_ranks, std::int32_t* counts, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_NCCL_KERNELS_H_
