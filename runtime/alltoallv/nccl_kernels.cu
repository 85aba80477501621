#include "runtime/alltoallv/nccl_kernels.h"

#include <cuda/atomic>

#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kCountThreads = 256;

__global__ void CountKernel(std::uint64_t* word) {
  // relaxed: the count says how far the stream has come and guards no data. system: the host reads.
  // No read-modify-write, which not every bus has: nobody else writes the word.
  cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system> count(*word);
  count.store(count.load(cuda::memory_order_relaxed) + 1, cuda::memory_order_relaxed);
}

// One block a rank.
__global__ void __launch_bounds__(kCountThreads)
    RowsToRankKernel(const std::int32_t* send_position, std::int64_t num_tokens,
                     std::int32_t* counts) {
  __shared__ int last;
  if (threadIdx.x == 0) last = -1;
  __syncthreads();
  int mine = -1;
  for (std::int64_t t = threadIdx.x; t < num_tokens; t += kCountThreads) {
    mine = max(mine, send_position[t * gridDim.x + blockIdx.x]);
  }
  mine = __reduce_max_sync(0xffffffffu, mine);
  if (threadIdx.x % 32 == 0) atomicMax(&last, mine);
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = last + 1;
}

}  // namespace

absl::Status LoadNcclKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(CountKernel));
  return LoadKernel(RowsToRankKernel);
}

absl::Status LaunchCount(std::uint64_t* word, cudaStream_t stream) {
  CountKernel<<<1, 1, 0, stream>>>(word);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

absl::Status LaunchRowsToRank(const std::int32_t* send_position, std::int64_t num_tokens,
                              int num_ranks, std::int32_t* counts, cudaStream_t stream) {
  RowsToRankKernel<<<num_ranks, kCountThreads, 0, stream>>>(send_position, num_tokens, counts);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
