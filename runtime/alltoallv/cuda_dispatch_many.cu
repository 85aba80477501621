// Dispatch of many rows. Every block counts, for each chunk of tokens, those that go to each rank,
// so that a row's place follows from its chunk's start and its chunk's ids, and no block waits for
// another (the ids are small and sit in L2). Then its warps draw pieces of rows, whoever is ready
// the next one (see cuda_row_turns.cuh), and write each to all of the row's ranks; when there are
// no more, the block raises every peer's arrival counter by one. Block 0 waits for all sources.
#include "runtime/alltoallv/cuda_dispatch_many.h"

#include "runtime/alltoallv/cuda_dispatch_rows.cuh"
#include "runtime/alltoallv/cuda_row_turns.cuh"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxChunks = 512;
constexpr int kChunksAtOnce = 4;  // of a warp's that it counts
constexpr int kMaxListedExperts = 1024;
constexpr std::int64_t kShortestTokens = std::int64_t{kMaxChunks} * kWarpSize;

struct ManyShared {
  int before[kMaxChunks][kMaxCudaRanks];  // rows to each rank from the chunks before
  int total[kMaxCudaRanks];
  RowDestinations destinations[kWarps];
  std::uint8_t ranks_of[kMaxListedExperts];  // of an expert: its owner's bit
};

// How tokens are cut into chunks, of a warp's width or, where tokens are many, several.
struct Chunks {
  __device__ explicit Chunks(std::int64_t num_tokens)
      : tokens((num_tokens / kShortestTokens + 1) * kWarpSize),
        count(static_cast<int>((num_tokens + tokens - 1) / tokens)) {}

  std::int64_t tokens;  // of a chunk
  int count;
};

__device__ void ListExperts(const CudaDispatchArgs& args, ManyShared* shared) {
  const int count = args.first_expert[args.area.num_ranks];
  for (int expert = static_cast<int>(threadIdx.x); expert < kMaxListedExperts; expert += kThreads) {
    const unsigned owner = expert < count ? 1u << OwnerOf(expert, args) : 0u;
    shared->ranks_of[expert] = static_cast<std::uint8_t>(owner);
  }
}

// Ids [k, k + N) of a token; -1 where there are none.
template <bool kByFour, int kN>
__device__ void LoadIds(const CudaDispatchArgs& args, std::int64_t token, int k, int (&ids)[kN]) {
  const int left = token < args.num_tokens ? args.topk - k : 0;
  const std::int32_t* from = args.topk_ids + token * args.topk + k;
#pragma unroll
  for (int i = 0; i < kN; i += kByFour ? 4 : 1) {
    if constexpr (kByFour) {
      const int4 four =
          i < left ? *reinterpret_cast<const int4*>(from + i) : make_int4(-1, -1, -1, -1);
      ids[i] = four.x;
      ids[i + 1] = four.y;
      ids[i + 2] = four.z;
      ids[i + 3] = four.w;
    } else {
      ids[i] = i < left ? from[i] : -1;
    }
  }
}

template <bool kByFour, int kIds, int kTokens>
__device__ void AddListedRanks(const CudaDispatchArgs& args, const std::int64_t (&token)[kTokens],
                               const ManyShared& shared, unsigned (&mask)[kTokens]) {
#pragma unroll 1
  for (int k = 0; k < args.topk; k += kIds) {
    int ids[kTokens][kIds];
#pragma unroll
    for (int u = 0; u < kTokens; ++u) LoadIds<kByFour>(args, token[u], k, ids[u]);
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
#pragma unroll
      for (const int expert : ids[u]) {
        if (expert >= 0) mask[u] |= shared.ranks_of[expert];
      }
    }
  }
}

// As RankMask() of several tokens, none from T on. Where the list has all experts, kIds ids of each
// token are on their way together.
template <int kIds, int kTokens>
__device__ void RankMasks(const CudaDispatchArgs& args, const std::int64_t (&token)[kTokens],
                          const ManyShared& shared, unsigned (&mask)[kTokens]) {
#pragma unroll
  for (int u = 0; u < kTokens; ++u) mask[u] = 0;
  if (args.first_expert[args.area.num_ranks] > kMaxListedExperts) {
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (token[u] < args.num_tokens) mask[u] = RankMask(args, token[u]);
    }
  } else if (args.topk % 4 == 0) {
    AddListedRanks<true, kIds>(args, token, shared, mask);
  } else {
    AddListedRanks<false, kIds / 4>(args, token, shared, mask);
  }
}

// Bit i: lane i's token goes to the rank that this lane asks for.
__device__ unsigned TokensTo(int rank, unsigned mask) {
  unsigned tokens = 0;
#pragma unroll
  for (int r = 0; r < kMaxCudaRanks; ++r) {
    const unsigned to_r = __ballot_sync(0xffffffffu, (mask >> r) & 1u);
    if (rank == r) tokens = to_r;
  }
  return tokens;
}

// The lane's mask of the token `first` + lane.
__device__ unsigned MaskFrom(const CudaDispatchArgs& args, std::int64_t first,
                             const ManyShared& shared) {
  const std::int64_t token[1] = {first + threadIdx.x % kWarpSize};
  unsigned mask[1];
  RankMasks<8>(args, token, shared, mask);
  return mask[0];
}

__device__ void CountChunks(const CudaDispatchArgs& args, const Chunks& chunks,
                            ManyShared* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  ListExperts(args, shared);
  __syncthreads();
  // The ids of several chunks are on their way at a time: this is done before any row is sent.
  for (int first = warp; first < chunks.count; first += kChunksAtOnce * kWarps) {
    int rows[kChunksAtOnce] = {};
    for (std::int64_t offset = 0; offset < chunks.tokens; offset += kWarpSize) {
      std::int64_t token[kChunksAtOnce];
      unsigned mask[kChunksAtOnce];
#pragma unroll
      for (int u = 0; u < kChunksAtOnce; ++u) {
        token[u] = (first + u * kWarps) * chunks.tokens + offset + lane;
      }
      RankMasks<8>(args, token, *shared, mask);
#pragma unroll
      for (int u = 0; u < kChunksAtOnce; ++u) rows[u] += __popc(TokensTo(lane, mask[u]));
    }
#pragma unroll
    for (int u = 0; u < kChunksAtOnce; ++u) {
      const int c = first + u * kWarps;
      if (c < chunks.count && lane < kMaxCudaRanks) shared->before[c][lane] = rows[u];
    }
  }
  __syncthreads();
  // From rows in each chunk to rows before it: a warp a rank.
  if (warp < kMaxCudaRanks) {
    int sum = 0;
    for (int first = 0; first < chunks.count; first += kWarpSize) {
      const int c = first + lane;
      const int rows = c < chunks.count ? shared->before[c][warp] : 0;
      int through = rows;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= step) through += left;
      }
      if (c < chunks.count) shared->before[c][warp] = sum + through - rows;
      sum += __shfl_sync(0xffffffffu, through, kWarpSize - 1);
    }
    if (lane == 0) shared->total[warp] = sum;
  }
  __syncthreads();
}

// The token's place among the rows to the rank that the lane asks for; -1: it does not go there.
__device__ int PositionOf(const CudaDispatchArgs& args, const Chunks& chunks, std::int64_t token,
                          int rank, const ManyShared& shared) {
  const auto chunk = static_cast<int>(token / chunks.tokens);
  std::int64_t first = chunk * chunks.tokens;
  int position = rank < kMaxCudaRanks ? shared.before[chunk][rank] : 0;
  for (; first + kWarpSize <= token; first += kWarpSize) {
    position += __popc(TokensTo(rank, MaskFrom(args, first, shared)));
  }
  const unsigned tokens = TokensTo(rank, MaskFrom(args, first, shared));
  const auto bit = static_cast<int>(token - first);
  if (((tokens >> bit) & 1u) == 0) return -1;
  return position + __popc(tokens & ((1u << bit) - 1u));
}

// How rows are cut into what a warp draws: pieces whose loads are all on their way at a time, so
// that at the end no warp has long to go when others have nothing left. Vectors are of what is
// sent.
template <RowPayload kPayload>
struct RowPieces {
  static constexpr bool kCasts = kPayload == RowPayload::kFp8;
  static constexpr int kMostSteps = kCasts ? 8 : 7;  // a warp's width each; fp8: a line of scales
  static constexpr int kStepsAtOnce = kCasts ? 2 : kMostSteps;

  __device__ explicit RowPieces(std::int64_t row_bytes)
      : row(static_cast<int>(row_bytes / 16)),
        count((row + kMostSteps * kWarpSize - 1) / (kMostSteps * kWarpSize)),
        vectors(kCasts ? kMostSteps * kWarpSize
                       : (row + count * kWarpSize - 1) / (count * kWarpSize) * kWarpSize) {}

  __device__ int Begin(int piece) const { return piece * vectors; }
  __device__ int End(int piece) const { return min(row, (piece + 1) * vectors); }

  int row;
  int count;
  int vectors;  // of a piece
};

// A lane's vectors of a piece from `start` on, loaded; of a row that is cast, pairs.
template <RowPayload kPayload>
struct LoadedSteps {
  using Pieces = RowPieces<kPayload>;
  static constexpr int kVectors = Pieces::kCasts ? 2 : 1;

  __device__ LoadedSteps(const uint4* row, int start, int end) {
#pragma unroll
    for (int u = 0; u < Pieces::kStepsAtOnce; ++u) {
      const int v = VectorOf(start, u);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        vector[u][i] = v < end ? __ldcs(row + v * kVectors + i) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  static __device__ int VectorOf(int start, int u) {
    return start + u * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
  }

  uint4 vector[Pieces::kStepsAtOnce][kVectors];
};

// Sends a piece. `loaded`: its first steps.
template <RowPayload kPayload>
__device__ void SendPiece(const uint4* row, int begin, int end, LoadedSteps<kPayload> loaded,
                          const RowDestinations& destinations) {
  using Pieces = RowPieces<kPayload>;
  using Loaded = LoadedSteps<kPayload>;
  constexpr int kStep = Pieces::kStepsAtOnce * kWarpSize;
  [[maybe_unused]] float kept = 0.0f;  // fp8: the scale of the piece's group `lane`
  for (int start = begin; start < end; start += kStep) {
    if (start > begin) loaded = Loaded(row, start, end);
    uint4 out[Pieces::kStepsAtOnce];
#pragma unroll
    for (int u = 0; u < Pieces::kStepsAtOnce; ++u) {
      if constexpr (Pieces::kCasts) {
        float scale;
        out[u] = CastPiece(loaded.vector[u][0], loaded.vector[u][1], &scale);
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        const float mine = __shfl_sync(0xffffffffu, scale, lane % 4 * 8);
        if (lane / 4 == (start - begin) / kWarpSize + u) kept = mine;
      } else {
        out[u] = loaded.vector[u][0];
      }
    }
    for (int d = 0; d < destinations.count; ++d) {
      uint4* to = destinations.row[d];
#pragma unroll
      for (int u = 0; u < Pieces::kStepsAtOnce; ++u) {
        const int v = Loaded::VectorOf(start, u);
        if (v < end) to[v] = out[u];
      }
    }
  }
  if constexpr (Pieces::kCasts) {
    constexpr int kVectorsPerGroup = kFp8GroupElements / 16;
    const int group = begin / kVectorsPerGroup + static_cast<int>(threadIdx.x) % kWarpSize;
    if (group >= end / kVectorsPerGroup) return;
    for (int d = 0; d < destinations.count; ++d) destinations.scales[d][group] = kept;
  }
}

template <RowPayload kPayload>
__global__ void __launch_bounds__(kThreads, 1)
    ManyDispatchKernel(const __grid_constant__ CudaDispatchArgs args) {
  __shared__ ManyShared shared;
  const AreaUse use = BeginUse(args.area, 0);
  RowTurns turns(args.tickets, GridWarp(static_cast<int>(gridDim.x)),
                 static_cast<int>(gridDim.x) * kWarps);
  const Chunks chunks(args.num_tokens);
  CountChunks(args, chunks, &shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int peer = lane < args.area.num_ranks ? PeerOfLane(args, lane) : kMaxCudaRanks;
  const RowBytes bytes = RowBytes::Of<kPayload>(args);
  const RowPieces<kPayload> pieces(bytes.sent);
  RowDestinations& destinations = shared.destinations[warp];
  const int num_turns = static_cast<int>(args.num_tokens) * pieces.count;
  for (int turn = turns.Next(); turn < num_turns; turn = turns.Next()) {
    const int token = turn / pieces.count;
    const int piece = turn % pieces.count;
    const uint4* row = bytes.Row(args, token);
    const LoadedSteps<kPayload> loaded(row, pieces.Begin(piece), pieces.End(piece));
    TokenNote note{};
    if (piece == 0) note = TokenNote::Load(args, token);
    const int position = PositionOf(args, chunks, token, peer, shared);
    const RowPlace place = PlaceOf(args, use, position);
    ListDestinations<kPayload>(args, place, &destinations);
    if (piece == 0) {
      StoreNotes(args, token, note, place);
      if (peer < kMaxCudaRanks) {
        args.send_position[std::int64_t{token} * args.area.num_ranks + peer] = position;
      }
    }
    __syncwarp();
    SendPiece(row, pieces.Begin(piece), pieces.End(piece), loaded, destinations);
    __syncwarp();  // The list of destinations is used anew for the warp's next piece.
  }
  Publish(args, use, blockIdx.x == 0 ? shared.total : nullptr);
  if (blockIdx.x == 0 && threadIdx.x < args.area.num_ranks) {
    WaitForArrivals(args, use, static_cast<int>(threadIdx.x));
  }
}

}  // namespace

absl::Status LoadManyDispatchKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(ManyDispatchKernel<RowPayload::kCopy>));
  return LoadKernel(ManyDispatchKernel<RowPayload::kFp8>);
}

cudaError_t LaunchManyDispatch(const CudaDispatchArgs& args, cudaStream_t stream) {
  if (args.payload == RowPayload::kFp8) {
    ManyDispatchKernel<RowPayload::kFp8><<<args.num_blocks, kThreads, 0, stream>>>(args);
  } else {
    ManyDispatchKernel<RowPayload::kCopy><<<args.num_blocks, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace epserve::runtime
