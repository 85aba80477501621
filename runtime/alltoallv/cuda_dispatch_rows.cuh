// What dispatch does with a row once it has a place: metadata and the row itself, copied or cast,
// go to each of the row's ranks from one read.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_ROWS_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_ROWS_CUH_

#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_device.cuh"
#include "runtime/base/cuda_fp8.cuh"
#include "runtime/base/limits.h"

namespace epserve::runtime {

// Where a team's present row goes, in other ranks' memory.
struct RowDestinations {
  uint4* row[kMaxCudaRanks];
  float* scales[kMaxCudaRanks];  // fp8 only
  int count;
};

// Of a row of x, and of what is sent of it.
struct RowBytes {
  std::int64_t input;
  std::int64_t sent;

  template <RowPayload kPayload>
  static __device__ RowBytes Of(const CudaDispatchArgs& args) {
    const std::int64_t input = args.hidden * (args.dtype == DataType::kFp32 ? 4 : 2);
    return {input, kPayload == RowPayload::kFp8 ? args.hidden : input};
  }
  __device__ const uint4* Row(const CudaDispatchArgs& args, std::int64_t token) const {
    return reinterpret_cast<const uint4*>(static_cast<const std::byte*>(args.x) + token * input);
  }
};

// The rank that lane `lane` looks at: from the one after this on, so that the ranks' first stores
// go different ways.
__device__ inline int PeerOfLane(const CudaDispatchArgs& args, int lane) {
  return (args.area.rank + 1 + lane) % args.area.num_ranks;
}

// Where a row goes, a lane's rank.
struct RowPlace {
  std::byte* area;  // of rank PeerOfLane(); null: the row does not go there
  std::int64_t row;
};

// `position`: of lanes below R, the row's place among this rank's rows to PeerOfLane(); -1: none.
__device__ inline RowPlace PlaceOf(const CudaDispatchArgs& args, const AreaUse& use, int position) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane >= args.area.num_ranks) return {nullptr, 0};
  const int peer = PeerOfLane(args, lane);
  if (position < 0 || position >= args.row_limit[peer]) return {nullptr, 0};
  return {args.area.heap[peer] + use.byte_offset, args.row_base[peer] + std::int64_t{position}};
}

// Lists the places that the row itself goes to. Called by a whole warp.
template <RowPayload kPayload>
__device__ void ListDestinations(const CudaDispatchArgs& args, const RowPlace& place,
                                 RowDestinations* destinations) {
  const AreaLayout& layout = args.area.layout;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool moves = place.area != nullptr && PeerOfLane(args, lane) != args.area.rank;
  const unsigned movers = __ballot_sync(0xffffffffu, moves);
  if (moves) {
    const int i = __popc(movers & ((1u << lane) - 1u));
    destinations->row[i] = reinterpret_cast<uint4*>(place.area + layout.rows +
                                                    place.row * RowBytes::Of<kPayload>(args).sent);
    if constexpr (kPayload == RowPayload::kFp8) {
      destinations->scales[i] = RowScales(place.area, layout, place.row);
    }
  }
  if (lane == 0) destinations->count = __popc(movers);
}

// A lane's note of a token, as it is in x: lanes below K an expert, the K lanes behind a weight.
struct TokenNote {
  std::int32_t word;

  static __device__ TokenNote Load(const CudaDispatchArgs& args, std::int64_t token) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const std::int64_t first = token * args.topk;
    if (lane < args.topk) return {args.topk_ids[first + lane]};
    if (lane < 2 * args.topk) {
      return {__float_as_int(args.topk_weights[first + lane - args.topk])};
    }
    return {-1};
  }
};
static_assert(2 * kMaxTopk <= kWarpSize, "a token's notes are a lane's each");

// Writes the row's notes to each of its ranks, in one store of the warp's.
__device__ inline void StoreNotes(const CudaDispatchArgs& args, std::int64_t token,
                                  const TokenNote& note, const RowPlace& place) {
  const AreaLayout& layout = args.area.layout;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int i = 0; i < args.area.num_ranks; ++i) {
    auto* area = reinterpret_cast<std::byte*>(
        __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(place.area), i));
    const std::int64_t row = __shfl_sync(0xffffffffu, place.row, i);
    if (area == nullptr) continue;
    const int receiver = PeerOfLane(args, i);
    std::int32_t word = note.word;
    if (lane < args.topk) {
      const bool there =
          word >= args.first_expert[receiver] && word < args.first_expert[receiver + 1];
      word = there ? word - args.first_expert[receiver] : -1;
    }
    if (lane < 2 * args.topk) ExpertNotes(area, layout, row)[lane] = word;
    if (receiver == args.area.rank && lane == 0) {
      reinterpret_cast<std::int32_t*>(area + layout.source_token)[row] =
          static_cast<std::int32_t>(token);
    }
  }
}

// Casts sixteen of a row's elements, of a group that eight neighbouring lanes share, to e4m3; in
// `scale` the group's. NaN elements stay NaN, and an infinite one makes its group NaN. Called by a
// whole warp.
__device__ inline uint4 CastPiece(const uint4& low, const uint4& high, float* scale) {
  constexpr int kLanesPerGroup = kFp8GroupElements / 16;
  float largest = fmaxf(MaxMagnitude(low), MaxMagnitude(high));
#pragma unroll
  for (int step = 1; step < kLanesPerGroup; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  *scale = Fp8Scale(largest);
  return CastToFp8(low, high, 1.0f / *scale);
}

// After the block's last row: tells every peer.
// `total`: rows to each rank; of one block, else null.
__device__ inline void Publish(const CudaDispatchArgs& args, const AreaUse& use, const int* total) {
  const int num_ranks = args.area.num_ranks;
  const AreaLayout& layout = args.area.layout;
  if (total != nullptr && threadIdx.x < num_ranks) {
    std::byte* area = args.area.heap[threadIdx.x] + use.byte_offset;
    reinterpret_cast<std::int32_t*>(area + layout.counts)[args.area.rank] = total[threadIdx.x];
  }
  __syncthreads();  // Orders every thread's payload stores before the releases.
  if (threadIdx.x < num_ranks) {
    std::byte* area = args.area.heap[threadIdx.x] + use.byte_offset;
    PublishToPeer(FlagOf(area + layout.arrivals, args.area.rank));
  }
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_ROWS_CUH_
