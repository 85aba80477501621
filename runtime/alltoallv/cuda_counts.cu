// The count exchange in one launch of one block: each rank writes what it counted into a record of
// its own in every rank's heap and raises a flag there, waits for all sources' flags in its own
// heap, and leaves the matrix in memory that the host reads. 2 KB a peer at 512 experts, so the
// time is one flag's way over the link and the host's look at the result.
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 256;

__device__ DeviceCountRecord* RecordOf(const CountsArgs& args, int heap, int source) {
  return reinterpret_cast<DeviceCountRecord*>(args.area.heap[heap] + args.area.area_offset +
                                              args.area.layout.count_records +
                                              source * args.area.layout.count_record_bytes);
}

__device__ std::int32_t* ValuesOf(DeviceCountRecord* record) {
  return reinterpret_cast<std::int32_t*>(record + 1);
}

__device__ std::uint64_t* CountFlag(const CountsArgs& args, int heap, int source) {
  return FlagOf(args.area.heap[heap] + args.area.area_offset + args.area.layout.count_flags,
                source);
}

__device__ void Raise(std::uint64_t* flag, std::uint64_t batch) {
  // release: what the block wrote (the barrier before made it this thread's past). system: a peer
  // or the host reads it. Pairs with WaitAtLeast's acquire, and the mailbox's.
  cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*flag).store(
      batch, cuda::memory_order_release);
}

__global__ void __launch_bounds__(kThreads) CountsKernel(const __grid_constant__ CountsArgs args) {
  const int num_ranks = args.area.num_ranks;
  const int rank = args.area.rank;
  const auto num_values = static_cast<int>(num_ranks + args.num_experts);
  for (int i = static_cast<int>(threadIdx.x); i < num_values; i += kThreads) {
    const std::int32_t value = args.mailbox.own[i];
    for (int step = 1; step <= num_ranks; ++step) {  // The own heap last.
      ValuesOf(RecordOf(args, (rank + step) % num_ranks, rank))[i] = value;
    }
  }
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < num_ranks) RecordOf(args, peer, rank)->sequence = args.batch;
  __syncthreads();  // Orders every thread's values before the releases.
  bool arrived = true;
  if (peer < num_ranks) {
    Raise(CountFlag(args, peer, rank), args.batch);
    arrived =
        WaitAtLeast(CountFlag(args, rank, peer), args.batch, peer, WaitStage::kCounts, args.wait);
  }
  if (__syncthreads_and(arrived) == 0) return;
  if (peer < num_ranks) args.mailbox.sequence[peer] = RecordOf(args, rank, peer)->sequence;
  for (int i = static_cast<int>(threadIdx.x); i < num_ranks * num_ranks; i += kThreads) {
    args.mailbox.matrix[i] = ValuesOf(RecordOf(args, rank, i / num_ranks))[i % num_ranks];
  }
  for (int e = static_cast<int>(threadIdx.x); e < args.num_experts; e += kThreads) {
    std::int32_t pairs = 0;
    for (int source = 0; source < num_ranks; ++source) {
      pairs += ValuesOf(RecordOf(args, rank, source))[num_ranks + e];
    }
    args.mailbox.matrix[num_ranks * num_ranks + e] = pairs;
  }
  __syncthreads();
  if (threadIdx.x == 0) Raise(args.mailbox.done, args.batch);
}

}  // namespace

absl::Status LoadCountsKernel() { return LoadKernel(CountsKernel); }

absl::Status LaunchCounts(const CountsArgs& args, cudaStream_t stream) {
  CountsKernel<<<1, kThreads, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
