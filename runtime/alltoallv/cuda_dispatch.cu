// Dispatch: one launch lays the rows out and pushes them.
//
// Each block owns a contiguous range of tokens. It counts, for every rank, the tokens before its
// range that go there (the ids are small and sit in L2), so that no block waits for another; then
// its teams write each row to all of the row's ranks from one read, metadata beside it, and the
// block raises every peer's arrival counter by one. Block 0 waits for all sources; where some may
// send packets (see cuda_dispatch_packets.cu), all warps take in what they send.
#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_packets.h"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/device_limits.h"
#include "runtime/base/cuda_fp8.cuh"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kMaxThreads = 1024;

struct DispatchShared {
  int base[kMaxCudaRanks];                       // rows to each rank before the present step
  int warp_totals[kWarpSize][kMaxCudaRanks];     // [warps]
  uint4* destination[kWarpSize][kMaxCudaRanks];  // [teams] rows that the team writes
  float* scale_destination[kWarpSize][kMaxCudaRanks];
  int num_destinations[kWarpSize];
  int position[kMaxThreads][kMaxCudaRanks];  // of the present step's tokens; -1 = none
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

// Writes the row's metadata to each of its ranks and lists the places the row itself goes to.
template <RowTeam kTeam, RowPayload kPayload>
__device__ void PrepareRow(const CudaDispatchArgs& args, std::int64_t area_offset,
                           std::int64_t token, int index_in_step, std::int64_t row_bytes,
                           DispatchShared* shared) {
  using T = Team<kTeam>;
  const AreaLayout& layout = args.area.layout;
  const int num_ranks = args.area.num_ranks;
  if (T::rank() < kWarpSize) {
    const int lane = T::rank();
    int position = -1;
    // Lane i looks at rank (own + 1 + i) mod R, so that the ranks' first stores go different ways.
    const int peer = (args.area.rank + 1 + lane) % num_ranks;
    if (lane < num_ranks) position = shared->position[index_in_step][peer];
    const bool sends = position >= 0 && position < args.row_limit[peer];
    std::byte* area = sends ? args.area.heap[peer] + area_offset : nullptr;
    const std::int64_t row = sends ? args.row_base[peer] + position : 0;
    const bool moves = sends && peer != args.area.rank;
    const unsigned movers = __ballot_sync(0xffffffffu, moves);
    if (moves) {
      const int place = __popc(movers & ((1u << lane) - 1u));
      shared->destination[T::index()][place] =
          reinterpret_cast<uint4*>(area + layout.rows + row * row_bytes);
      if constexpr (kPayload == RowPayload::kFp8) {
        shared->scale_destination[T::index()][place] =
            reinterpret_cast<float*>(area + layout.scales) +
            row * (args.hidden / kFp8GroupElements);
      }
    }
    if (lane == 0) shared->num_destinations[T::index()] = __popc(movers);
    for (int r = 0; r < num_ranks; ++r) {
      const auto to = reinterpret_cast<std::byte*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(area), r));
      const std::int64_t at = __shfl_sync(0xffffffffu, row, r);
      if (to == nullptr) continue;
      const int receiver = (args.area.rank + 1 + r) % num_ranks;
      if (lane < args.topk) {
        const int id = args.topk_ids[token * args.topk + lane];
        const bool there =
            id >= args.first_expert[receiver] && id < args.first_expert[receiver + 1];
        reinterpret_cast<std::int32_t*>(to + layout.topk_ids)[at * args.topk + lane] =
            there ? id - args.first_expert[receiver] : -1;
        reinterpret_cast<float*>(to + layout.topk_weights)[at * args.topk + lane] =
            args.topk_weights[token * args.topk + lane];
      }
      if (lane == kMaxCudaTopk) {
        reinterpret_cast<std::int32_t*>(to + layout.source_token)[at] =
            static_cast<std::int32_t>(token);
      }
    }
  }
  T::sync();
}

// A thread's first pieces of a row, loaded before the row's place is known.
struct RowHead {
  uint4 piece[2];
};

template <RowTeam kTeam, RowPayload kPayload>
__device__ RowHead LoadHead(const uint4* row, std::int64_t num_vectors) {
  using T = Team<kTeam>;
  RowHead head;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t v =
        kPayload == RowPayload::kFp8 ? 2 * T::rank() + i : T::rank() + i * T::size();
    head.piece[i] = v < num_vectors ? __ldcs(row + v) : make_uint4(0, 0, 0, 0);
  }
  return head;
}

// `head`: the row's LoadHead where `has_head`.
template <RowTeam kTeam>
__device__ void CopyRow(const uint4* row, std::int64_t num_vectors, bool has_head,
                        const RowHead& head, const DispatchShared& shared) {
  using T = Team<kTeam>;
  constexpr int kUnroll = kTeam == RowTeam::kWarp ? 7 : 2;  // 7 x 32 lanes: a quarter of 7168 bf16
  const int num_destinations = shared.num_destinations[T::index()];
  for (std::int64_t start = 0; start < num_vectors; start += kUnroll * T::size()) {
    uint4 piece[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = start + u * T::size() + T::rank();
      const bool loaded = u < 2 && has_head && start == 0;
      if (loaded) {
        piece[u] = head.piece[u % 2];
      } else if (v < num_vectors) {
        piece[u] = __ldcs(row + v);
      }
    }
    for (int d = 0; d < num_destinations; ++d) {
      uint4* to = shared.destination[T::index()][d];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t v = start + u * T::size() + T::rank();
        if (v < num_vectors) to[v] = piece[u];
      }
    }
  }
}

// Stores the scales of the warp's four groups `group` to `group` + 3, each known to its eight
// lanes. A warp that has the row to itself keeps them until it has a whole line's worth: short
// stores cost the link as much as long ones.
template <RowTeam kTeam>
__device__ void StoreScales(float scale, std::int64_t group, std::int64_t num_groups, float* kept,
                            const DispatchShared& shared) {
  using T = Team<kTeam>;
  const int lane = threadIdx.x % kWarpSize;
  const int num_destinations = shared.num_destinations[T::index()];
  if constexpr (kTeam == RowTeam::kWarp) {
    const float mine = __shfl_sync(0xffffffffu, scale, lane % 4 * 8);
    const int in_line = static_cast<int>(group % kWarpSize);
    if (lane / 4 == in_line / 4) *kept = mine;
    if (in_line + 4 < kWarpSize && group + 4 < num_groups) return;
    const std::int64_t at = group - in_line + lane;
    if (lane >= in_line + 4 || at >= num_groups) return;
    for (int d = 0; d < num_destinations; ++d) {
      shared.scale_destination[T::index()][d][at] = *kept;
    }
  } else {
    const std::int64_t at = group + lane / 8;
    if (lane % 8 != 0 || at >= num_groups) return;
    for (int d = 0; d < num_destinations; ++d) {
      shared.scale_destination[T::index()][d][at] = scale;
    }
  }
}

// Casts the row on its way: each thread takes 16 elements, so that eight neighbours share a scale
// and every store is 16 bytes. NaN elements stay NaN, and an
// infinite one makes its group NaN.
template <RowTeam kTeam>
__device__ void CastRow(const uint4* row, std::int64_t hidden, bool has_head, const RowHead& head,
                        const DispatchShared& shared) {
  using T = Team<kTeam>;
  constexpr int kLanesPerGroup = kFp8GroupElements / 16;
  constexpr int kUnroll = 2;
  const int num_destinations = shared.num_destinations[T::index()];
  const std::int64_t num_pieces = hidden / 16;
  float kept_scale = 0.0f;
  for (std::int64_t start = 0; start < num_pieces; start += kUnroll * T::size()) {
    uint4 low[kUnroll], high[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t p = start + u * T::size() + T::rank();
      low[u] = high[u] = make_uint4(0, 0, 0, 0);
      if (u == 0 && has_head && start == 0) {
        low[u] = head.piece[0];
        high[u] = head.piece[1];
      } else if (p < num_pieces) {
        low[u] = __ldcs(row + 2 * p);
        high[u] = __ldcs(row + 2 * p + 1);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t p = start + u * T::size() + T::rank();
      float largest = fmaxf(MaxMagnitude(low[u]), MaxMagnitude(high[u]));
#pragma unroll
      for (int step = 1; step < kLanesPerGroup; step *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }
      const float scale = Fp8Scale(largest);
      const uint4 packed = CastToFp8(low[u], high[u], 1.0f / scale);
      if (p < num_pieces) {
        for (int d = 0; d < num_destinations; ++d) shared.destination[T::index()][d][p] = packed;
      }
      const std::int64_t warp_group = (p - threadIdx.x % kWarpSize) / kLanesPerGroup;
      if (warp_group < hidden / kFp8GroupElements) {
        StoreScales<kTeam>(scale, warp_group, hidden / kFp8GroupElements, &kept_scale, shared);
      }
    }
  }
}

// After the block's last row: tells every peer.
__device__ void Publish(const CudaDispatchArgs& args, const AreaUse& use,
                        const DispatchShared& shared) {
  const int num_ranks = args.area.num_ranks;
  const AreaLayout& layout = args.area.layout;
  // The last block's range ends at T, so that its base holds the totals.
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < num_ranks) {
    std::byte* area = args.area.heap[threadIdx.x] + use.byte_offset;
    reinterpret_cast<std::int32_t*>(area + layout.counts)[args.area.rank] =
        shared.base[threadIdx.x];
  }
  __syncthreads();  // Orders every thread's payload stores before the releases.
  if (threadIdx.x < num_ranks) {
    std::byte* area = args.area.heap[threadIdx.x] + use.byte_offset;
    PublishToPeer(FlagOf(area + layout.arrivals, args.area.rank));
  }
}

template <RowTeam kTeam, RowPayload kPayload>
__global__ void __launch_bounds__(kMaxThreads, 1)
    DispatchKernel(const __grid_constant__ CudaDispatchArgs args) {
  __shared__ DispatchShared shared;
  using T = Team<kTeam>;
  const AreaUse use = BeginUse(args.area, 0);
  bool some_send_packets = false;
  if constexpr (kTeam == RowTeam::kBlock) {  // Always, in an area that has packets.
    AllowNextKernel();
    some_send_packets = args.area.layout.packet_capacity > 0;
    if (some_send_packets && blockIdx.x == 0) TellPeers(args, use, {});
  }
  const std::int64_t begin = args.num_tokens * blockIdx.x / gridDim.x;
  const std::int64_t end = args.num_tokens * (blockIdx.x + 1) / gridDim.x;
  const std::int64_t element_bytes = args.dtype == DataType::kFp32 ? 4 : 2;
  const std::int64_t input_bytes = args.hidden * element_bytes;
  const std::int64_t row_bytes = kPayload == RowPayload::kFp8 ? args.hidden : input_bytes;
  const auto row_of = [&](std::int64_t token) {
    return reinterpret_cast<const uint4*>(static_cast<const std::byte*>(args.x) +
                                          token * input_bytes);
  };
  RowHead head{};
  if constexpr (kTeam == RowTeam::kBlock) {
    // The block's first row is on its way while its place is being worked out.
    if (begin < end) head = LoadHead<kTeam, kPayload>(row_of(begin), input_bytes / 16);
  }
  // Few tokens are all placed in one look, the earlier ones only to be counted.
  const bool one_look = end <= blockDim.x;
  CountBefore(args, one_look || begin == end ? 0 : begin, &shared);
  for (std::int64_t step = one_look ? 0 : begin; begin < end && step < end; step += blockDim.x) {
    PlaceTokens(args, step, begin, end, &shared);
    const std::int64_t step_end = step + blockDim.x < end ? step + blockDim.x : end;
    const std::int64_t step_begin = step > begin ? step : begin;
    for (std::int64_t token = step_begin + T::index(); token < step_end; token += T::count()) {
      PrepareRow<kTeam, kPayload>(args, use.byte_offset, token, static_cast<int>(token - step),
                                  row_bytes, &shared);
      const bool has_head = kTeam == RowTeam::kBlock && token == begin;
      if constexpr (kPayload == RowPayload::kFp8) {
        CastRow<kTeam>(row_of(token), args.hidden, has_head, head, shared);
      } else {
        CopyRow<kTeam>(row_of(token), input_bytes / 16, has_head, head, shared);
      }
      T::sync();  // The list of destinations is used anew for the team's next row.
    }
    __syncthreads();
  }
  Publish(args, use, shared);
  if (some_send_packets) {
    Receive<kPayload>(args, use, GridWarp(static_cast<int>(gridDim.x)),
                      static_cast<int>(gridDim.x * (blockDim.x / kWarpSize)));
  } else if (blockIdx.x == 0 && threadIdx.x < args.area.num_ranks) {
    WaitForArrivals(args, use, static_cast<int>(threadIdx.x));
  }
}

template <RowTeam kTeam>
cudaError_t Launch(const CudaDispatchArgs& args, int threads, cudaStream_t stream) {
  if (args.payload == RowPayload::kFp8) {
    DispatchKernel<kTeam, RowPayload::kFp8><<<args.num_blocks, threads, 0, stream>>>(args);
  } else {
    DispatchKernel<kTeam, RowPayload::kCopy><<<args.num_blocks, threads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

absl::Status LoadDispatchKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(DispatchKernel<RowTeam::kWarp, RowPayload::kCopy>));
  EPS_RETURN_IF_ERROR(LoadKernel(DispatchKernel<RowTeam::kWarp, RowPayload::kFp8>));
  EPS_RETURN_IF_ERROR(LoadKernel(DispatchKernel<RowTeam::kBlock, RowPayload::kCopy>));
  EPS_RETURN_IF_ERROR(LoadPacketDispatchKernels());
  return LoadKernel(DispatchKernel<RowTeam::kBlock, RowPayload::kFp8>);
}

absl::Status LaunchDispatch(const CudaDispatchArgs& args, cudaStream_t stream) {
  if (args.topk < 1 || args.topk > kMaxCudaTopk) {
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: topk ", args.topk, " outside [1, ", kMaxCudaTopk, "]"));
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
  const std::int64_t most_as_packets = args.area.layout.packet_capacity;
  if (most_as_packets > 0 && args.num_tokens <= most_as_packets) {
    EPS_CUDA_RETURN_IF_ERROR(LaunchPacketDispatch(args, stream));
    return absl::OkStatus();
  }
  // Few rows a block: their latency counts, so a whole block works on each.
  const bool few = args.num_tokens <= std::int64_t{8} * args.num_blocks;
  if (few || most_as_packets > 0) {
    EPS_CUDA_RETURN_IF_ERROR(Launch<RowTeam::kBlock>(args, 512, stream));
  } else {
    EPS_CUDA_RETURN_IF_ERROR(Launch<RowTeam::kWarp>(args, kMaxThreads, stream));
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
