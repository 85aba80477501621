// The copy limit of GPUs: every rank pushes the same bytes to every peer with plain 16-byte stores,
// all at once, and nothing else.
#ifndef EPSERVE_RUNTIME_MICROBENCH_CUDA_PLAIN_PUSH_H_
#define EPSERVE_RUNTIME_MICROBENCH_CUDA_PLAIN_PUSH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/alltoallv/cuda_layout.h"

namespace epserve::runtime {

struct PlainPushArgs {
  const void* source;                   // at least the largest of vectors
  void* destination[kMaxCudaRanks];     // [R] in the peers' heaps
  std::int64_t vectors[kMaxCudaRanks];  // [R] of 16 bytes; 0 for this rank itself
  int rank;
  int num_ranks;
};

// Enqueues the push with `num_blocks` blocks, spread evenly over the peers.
absl::Status LaunchPlainPush(const PlainPushArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_CUDA_PLAIN_PUSH_H_
