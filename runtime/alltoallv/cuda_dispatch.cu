// Dispatch: one launch lays the rows out and pushes them.
//
// The kernel here is for few rows, whose latency counts: a whole block works on each. (Those for
// many rows and for lines are in cuda_dispatch_many.cu and cuda_dispatch_lines.cu.) Each block owns
// a contiguous range of tokens. It counts, for every rank, the tokens before its range that go
// there (the ids are small and sit in L2), so that no block waits for another; then it writes each
// row to all of the row's ranks, and raises every peer's arrival counter by one. Block 0 waits for
// all sources; where some may send lines, all warps take in what they send.
#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_lines.h"
#include "runtime/alltoallv/cuda_dispatch_many.h"
#include "runtime/alltoallv/cuda_dispatch_rows.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/device_limits.h"
#include "runtime/base/cuda_status.h"
#include "runtime/base/limits.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 512;

struct DispatchShared {
  int base[kMaxCudaRanks];                    // rows to each rank before the present step
  int warp_totals[kWarpSize][kMaxCudaRanks];  // [warps]
  RowDestinations destinations;
  int position[kThreads][kMaxCudaRanks];  // of the present step's tokens; -1 = none
};

// base[r] = tokens in [0, end) that go to rank r.
__device__ void CountBefore(const CudaDispatchArgs& args, std::int64_t end,
                            DispatchShared* shared) {
  if (threadIdx.x < kMaxCudaRanks) shared->base[threadIdx.x] = 0;
  __syncthreads();
  int counts[kMaxCudaRanks] = {};
  for (std::int64_t t = threadIdx.x; t < end; t += blockDim.x) {
    const unsigned mask = RankMask(args, t);
#pragma unroll
    for (int r = 0; r < kMaxCudaRanks; ++r) counts[r] += (mask >> r) & 1u;
  }
#pragma unroll
  for (int r = 0; r < kMaxCudaRanks; ++r) {
    const int sum = __reduce_add_sync(0xffffffffu, counts[r]);
    if (threadIdx.x % kWarpSize == 0 && sum != 0) atomicAdd(&shared->base[r], sum);
  }
  __syncthreads();
}

// Places the tokens [step, step + blockDim.x) below `end`, one a thread; in send_position, those
// from `begin` on, which are the block's own.
__device__ void PlaceTokens(const CudaDispatchArgs& args, std::int64_t step, std::int64_t begin,
                            std::int64_t end, DispatchShared* shared) {
  const std::int64_t token = step + threadIdx.x;
  const unsigned mask = token < end ? RankMask(args, token) : 0u;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int before[kMaxCudaRanks];
#pragma unroll
  for (int r = 0; r < kMaxCudaRanks; ++r) {
    const unsigned ballot = __ballot_sync(0xffffffffu, (mask >> r) & 1u);
    before[r] = __popc(ballot & ((1u << lane) - 1u));
    if (lane == r) shared->warp_totals[warp][r] = __popc(ballot);
  }
  __syncthreads();
  int of_earlier_warps = 0;
  if (lane < kMaxCudaRanks) {
    of_earlier_warps = shared->base[lane];
    for (int w = 0; w < warp; ++w) of_earlier_warps += shared->warp_totals[w][lane];
  }
#pragma unroll
  for (int r = 0; r < kMaxCudaRanks; ++r) {
    const int start = __shfl_sync(0xffffffffu, of_earlier_warps, r);
    if (token < end && r < args.area.num_ranks) {
      const int position = ((mask >> r) & 1u) != 0 ? start + before[r] : -1;
      shared->position[threadIdx.x][r] = position;
      if (token >= begin) args.send_position[token * args.area.num_ranks + r] = position;
    }
  }
  __syncthreads();
  if (threadIdx.x < kMaxCudaRanks) {
    int total = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x / kWarpSize); ++w) {
      total += shared->warp_totals[w][threadIdx.x];
    }
    shared->base[threadIdx.x] += total;
  }
  __syncthreads();
}

// A thread's first vectors of a row, loaded before the row's place is known.
struct RowHead {
  uint4 vector[2];
};

template <RowPayload kPayload>
__device__ RowHead LoadHead(const uint4* row, std::int64_t num_vectors) {
  RowHead head;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t v =
        kPayload == RowPayload::kFp8 ? 2 * threadIdx.x + i : threadIdx.x + i * kThreads;
    head.vector[i] = v < num_vectors ? __ldcs(row + v) : make_uint4(0, 0, 0, 0);
  }
  return head;
}

// `head`: the row's LoadHead.
__device__ void CopyRow(const uint4* row, std::int64_t num_vectors, const RowHead& head,
                        const RowDestinations& destinations) {
  for (std::int64_t start = 0; start < num_vectors; start += 2 * kThreads) {
    uint4 vector[2] = {head.vector[0], head.vector[1]};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const std::int64_t v = start + u * kThreads + threadIdx.x;
      if (start > 0 && v < num_vectors) vector[u] = __ldcs(row + v);
    }
    for (int d = 0; d < destinations.count; ++d) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const std::int64_t v = start + u * kThreads + threadIdx.x;
        if (v < num_vectors) destinations.row[d][v] = vector[u];
      }
    }
  }
}

// Casts the row on its way: each thread takes 16 elements, so that every store is 16 bytes.
__device__ void CastRow(const uint4* row, std::int64_t hidden, const RowHead& head,
                        const RowDestinations& destinations) {
  constexpr int kLanesPerGroup = kFp8GroupElements / 16;
  const std::int64_t num_pieces = hidden / 16;
  for (std::int64_t start = 0; start < num_pieces; start += kThreads) {
    const std::int64_t p = start + threadIdx.x;
    uint4 low = head.vector[0], high = head.vector[1];
    if (start > 0) {
      low = p < num_pieces ? __ldcs(row + 2 * p) : make_uint4(0, 0, 0, 0);
      high = p < num_pieces ? __ldcs(row + 2 * p + 1) : make_uint4(0, 0, 0, 0);
    }
    float scale;
    const uint4 packed = CastPiece(low, high, &scale);
    if (p >= num_pieces) continue;
    for (int d = 0; d < destinations.count; ++d) {
      destinations.row[d][p] = packed;
      if (p % kLanesPerGroup == 0) destinations.scales[d][p / kLanesPerGroup] = scale;
    }
  }
}

template <RowPayload kPayload>
__global__ void __launch_bounds__(kThreads)
    DispatchKernel(const __grid_constant__ CudaDispatchArgs args) {
  __shared__ DispatchShared shared;
  const AreaUse use = BeginUse(args.area, 0);
  AllowNextKernel();
  const bool some_send_lines = args.area.layout.line_capacity > 0;
  if (some_send_lines && blockIdx.x == 0) TellPeers(args, use, {});
  const std::int64_t begin = args.num_tokens * blockIdx.x / gridDim.x;
  const std::int64_t end = args.num_tokens * (blockIdx.x + 1) / gridDim.x;
  const RowBytes bytes = RowBytes::Of<kPayload>(args);
  // The block's first row is on its way while its place is being worked out.
  RowHead head{};
  if (begin < end) head = LoadHead<kPayload>(bytes.Row(args, begin), bytes.input / 16);
  // Few tokens are all placed in one look, the earlier ones only to be counted.
  const bool one_look = end <= blockDim.x;
  CountBefore(args, one_look || begin == end ? 0 : begin, &shared);
  for (std::int64_t step = one_look ? 0 : begin; begin < end && step < end; step += blockDim.x) {
    PlaceTokens(args, step, begin, end, &shared);
    const std::int64_t step_end = step + blockDim.x < end ? step + blockDim.x : end;
    for (std::int64_t token = step > begin ? step : begin; token < step_end; ++token) {
      if (token > begin) head = LoadHead<kPayload>(bytes.Row(args, token), bytes.input / 16);
      if (threadIdx.x < kWarpSize) {
        const TokenNote note = TokenNote::Load(args, token);
        const int peer = PeerOfLane(args, static_cast<int>(threadIdx.x));
        const RowPlace place = PlaceOf(args, use, shared.position[token - step][peer]);
        ListDestinations<kPayload>(args, place, &shared.destinations);
        StoreNotes(args, token, note, place);
      }
      __syncthreads();
      if constexpr (kPayload == RowPayload::kFp8) {
        CastRow(bytes.Row(args, token), args.hidden, head, shared.destinations);
      } else {
        CopyRow(bytes.Row(args, token), bytes.input / 16, head, shared.destinations);
      }
      __syncthreads();  // The list of destinations is used anew for the next row.
    }
  }
  // The last block's range ends at T, so that its base holds the totals.
  Publish(args, use, blockIdx.x == gridDim.x - 1 ? shared.base : nullptr);
  if (some_send_lines) {
    Receive<kPayload>(args, use, GridWarp(static_cast<int>(gridDim.x)),
                      static_cast<int>(gridDim.x * (blockDim.x / kWarpSize)));
  } else if (blockIdx.x == 0 && threadIdx.x < args.area.num_ranks) {
    WaitForArrivals(args, use, static_cast<int>(threadIdx.x));
  }
}

cudaError_t Launch(const CudaDispatchArgs& args, cudaStream_t stream) {
  if (args.payload == RowPayload::kFp8) {
    DispatchKernel<RowPayload::kFp8><<<args.num_blocks, kThreads, 0, stream>>>(args);
  } else {
    DispatchKernel<RowPayload::kCopy><<<args.num_blocks, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

absl::Status LoadDispatchKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(DispatchKernel<RowPayload::kCopy>));
  EPS_RETURN_IF_ERROR(LoadKernel(DispatchKernel<RowPayload::kFp8>));
  EPS_RETURN_IF_ERROR(LoadLineDispatchKernels());
  return LoadManyDispatchKernels();
}

absl::Status LaunchDispatch(const CudaDispatchArgs& args, cudaStream_t stream) {
  if (args.topk < 1 || args.topk > kMaxTopk) {
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: topk ", args.topk, " outside [1, ", kMaxTopk, "]"));
  }
  if (args.area.num_ranks < 1 || args.area.num_ranks > kMaxCudaRanks) {
    return absl::InvalidArgumentError(absl::StrCat("dispatch: num_ranks ", args.area.num_ranks,
                                                   " outside [1, ", kMaxCudaRanks, "]"));
  }
  EPS_RETURN_IF_ERROR(CheckRowBytes("dispatch", args.hidden, args.dtype));
  if (args.payload == RowPayload::kFp8 &&
      (args.dtype != DataType::kBf16 || args.hidden % kFp8GroupElements != 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "dispatch: the fp8 cast takes bf16 rows with a hidden size that is a multiple of ",
        kFp8GroupElements, ", got ", std::string(DataTypeName(args.dtype)), " and ", args.hidden));
  }
  if (SendsLines(args.area, args.num_tokens)) {
    EPS_CUDA_RETURN_IF_ERROR(LaunchLineDispatch(args, stream));
    return absl::OkStatus();
  }
  // Few rows a block: their latency counts, so a whole block works on each.
  const bool few = args.num_tokens <= std::int64_t{8} * args.num_blocks;
  if (few || args.area.layout.line_capacity > 0) {
    EPS_CUDA_RETURN_IF_ERROR(Launch(args, stream));
  } else {
    EPS_CUDA_RETURN_IF_ERROR(LaunchManyDispatch(args, stream));
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
