// What the benchmark runs on GPUs beside the exchange itself: the plain push that is the copy
// limit, the stand-in for the experts, and random numbers. Launchers enqueue on `stream` and
// return.
#ifndef EPSERVE_RUNTIME_MICROBENCH_CUDA_BENCH_KERNELS_H_
#define EPSERVE_RUNTIME_MICROBENCH_CUDA_BENCH_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/alltoallv/cuda_layout.h"
#include "runtime/base/dtype.h"

namespace epserve::runtime {

struct PlainPushArgs {
  const void* source;                   // at least the largest of `vectors`
  void* destination[kMaxCudaRanks];     // [R] in the peers' heaps
  std::int64_t vectors[kMaxCudaRanks];  // [R] of 16 bytes; 0 for this rank itself
  int rank;
  int num_ranks;
};

// Pushes the same bytes to every peer at once with plain 16-byte stores, and nothing else.
absl::Status LaunchPlainPush(const PlainPushArgs& args, int num_blocks, cudaStream_t stream);

struct StandInExpertsArgs {
  void* rows;                         // [M, H] dtype, expert-major, in place
  const std::int32_t* expert_offset;  // [E_local + 1]
  int num_local_experts;
  std::int64_t first_expert;
  std::int64_t num_experts;
  std::int64_t hidden;
  DataType dtype;  // bf16, fp16 or fp32
};

// Expert e multiplies its rows by 1 + e / E, as RunStandInExperts does on the host.
absl::Status LaunchStandInExperts(const StandInExpertsArgs& args, cudaStream_t stream);

struct FillRandomArgs {
  void* out;       // [count] dtype
  DataType dtype;  // bf16, fp32 or fp8
  std::uint64_t count;
  std::uint64_t seed;
  float amplitude;
};

// Element i becomes RandomUnit(seed, i) * amplitude, rounded.
absl::Status LaunchFillRandom(const FillRandomArgs& args, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_CUDA_BENCH_KERNELS_H_
