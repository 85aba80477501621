// A barrier of all GPUs of an epoch: each rank adds one to its counter at every peer, then waits
// until every counter of its own has reached the barrier's number. Counters only grow.
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

struct BarrierArgs {
  std::byte* heap[kMaxCudaRanks];
  int rank;
  int num_ranks;
  std::int64_t offset;
  std::uint64_t* device_use;
  WaitControl wait;
};

__global__ void BarrierKernel(const __grid_constant__ BarrierArgs args) {
  const std::uint64_t use = *args.device_use + 1;
  __syncthreads();  // Every thread has read the counter before thread 0 advances it.
  if (threadIdx.x == 0) *args.device_use = use;
  const int peer = static_cast<int>(threadIdx.x);
  if (peer >= args.num_ranks) return;
  PublishToPeer(FlagOf(args.heap[peer] + args.offset, args.rank));
  WaitAtLeast(FlagOf(args.heap[args.rank] + args.offset, peer), use, peer, WaitStage::kBarrier,
              args.wait);
}

}  // namespace

absl::Status LoadBarrierKernel() { return LoadKernel(BarrierKernel); }

absl::Status LaunchBarrier(std::byte* const* heaps, int rank, int num_ranks,
                           std::int64_t barrier_offset, std::uint64_t* device_use,
                           const WaitControl& wait, cudaStream_t stream) {
  BarrierArgs args{};
  for (int r = 0; r < num_ranks; ++r) args.heap[r] = heaps[r];
  args.rank = rank;
  args.num_ranks = num_ranks;
  args.offset = barrier_offset;
  args.device_use = device_use;
  args.wait = wait;
  BarrierKernel<<<1, 32, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
