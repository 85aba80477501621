// One rank's process of the benchmark on a GPU, of the cuda and nccl backends. Rank r takes device
// r mod the number of devices it sees. Every phase follows a barrier of all GPUs and is timed with
// events.
#ifndef EPSERVE_RUNTIME_MICROBENCH_CUDA_RANK_RUN_H_
#define EPSERVE_RUNTIME_MICROBENCH_CUDA_RANK_RUN_H_

#include "absl/status/status.h"
#include "runtime/microbench/coordination.h"

namespace epserve::runtime {

// UNAVAILABLE: this machine has no GPU.
absl::Status RunCudaBenchRank(const Coordination& coordination, int rank);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_CUDA_RANK_RUN_H_
