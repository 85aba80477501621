// Dispatch of rows as lines (see cuda_line_device.cuh). The first blocks push: each works out by
// itself, from the ids of all tokens, where every row goes, and its warps push units of rows. The
// others take in what peers push, where their looks do not stand behind stores that wait for the
// link. No block waits for another of its rank. A receiver puts the rows where those that do not
// come as lines are, so that what follows need not know.
#include <algorithm>

#include "runtime/alltoallv/cuda_dispatch_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_lines.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kWarps >= kMaxCudaRanks, "a block alone has a warp for every peer");

// Eighths of the blocks that push. On 4 H200s, 128 tokens of 7168 a rank, cast to fp8 and as bf16:
// 1 took 20.0 and 26.1 us, 2 19.3 and 25.7, 3 19.4 and 25.9, 4 20.9 and 26.9.
constexpr int kPushShare = 2;

// Lines of a row that a warp pushes together, and how many of them a lane has a part of.
constexpr int kUnitLines = Fp8Lines::kLinesPerUnit;
constexpr int kParts = kUnitLines / kLinesAtOnce;

// Where the tokens go: bit t % 32 of tokens[t / 32][r] is set where token t goes to rank r.
struct Ranks {
  unsigned tokens[kMaxLineTokens / kWarpSize][kMaxCudaRanks];

  // Called by the whole block; a __syncthreads() comes after.
  __device__ void Fill(const CudaDispatchArgs& args) {
    for (int base = static_cast<int>(threadIdx.x) / kWarpSize * kWarpSize; base < args.num_tokens;
         base += kThreads) {
      const int token = base + LaneOfWarp();
      const unsigned mask = token < args.num_tokens ? RankMask(args, token) : 0u;
      for (int r = 0; r < args.area.num_ranks; ++r) {
        const unsigned going = __ballot_sync(0xffffffffu, (mask >> r) & 1u);
        if (LaneOfWarp() == r) tokens[base / kWarpSize][r] = going;
      }
    }
  }

  // The token's place among those to `rank`; -1: it does not go there.
  __device__ int PositionOf(int token, int rank) const {
    const unsigned going = tokens[token / kWarpSize][rank];
    if (((going >> token % kWarpSize) & 1u) == 0) return -1;
    int position = __popc(going & ((1u << token % kWarpSize) - 1u));
#pragma unroll 1
    for (int i = 0; i < token / kWarpSize; ++i) position += __popc(tokens[i][rank]);
    return position;
  }

  __device__ int CountTo(int rank, std::int64_t num_tokens) const {
    int count = 0;
#pragma unroll 1
    for (int i = 0; i * kWarpSize < num_tokens; ++i) count += __popc(tokens[i][rank]);
    return count;
  }
};

// What a lane pushes of a unit, as it is loaded.
struct Loaded {
  uint4 low[kParts] = {};
  uint4 high[kParts] = {};  // only where the row is cast
  Note note[kParts];
  LineTail tail[kParts];  // of a tail
};

__device__ int LineOf(int unit, int part) {
  return unit * kUnitLines + part * kLinesAtOnce + LineOfWarp();
}

template <RowPayload kPayload, typename Lines>
__device__ Loaded Load(const CudaDispatchArgs& args, const Lines& lines, int unit, int token) {
  constexpr int kVectors = kPayload == RowPayload::kFp8 ? 2 : 1;  // read for one that travels
  const auto* row =
      static_cast<const uint4*>(args.x) + token * VectorsOf<kPayload>(args) * kVectors;
  Loaded loaded;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    int vector = lines.VectorAt(LineOf(unit, p), LaneOfLine());
    if (IsTail()) {
      loaded.tail[p] = lines.TailAt(LineOf(unit, p));
      vector = loaded.tail[p].vector;
    }
    if (vector < 0) continue;
    loaded.low[p] = __ldcs(row + vector * kVectors);
    if constexpr (kVectors == 2) loaded.high[p] = __ldcs(row + vector * kVectors + 1);
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int note = loaded.tail[p].note;
    if (note < 0) continue;
    if (note == args.topk) {
      loaded.note[p].id = token;
    } else {
      loaded.note[p].id = args.topk_ids[std::int64_t{token} * args.topk + note];
      loaded.note[p].weight = args.topk_weights[std::int64_t{token} * args.topk + note];
    }
  }
  return loaded;
}

// A lane's part of each of the unit's lines, ready to be stored.
struct Packed {
  LaneData data[kParts];
};

__device__ Packed PackFp8(const Loaded& loaded, std::uint64_t use) {
  float largest = 0.0f;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    largest = fmaxf(largest, fmaxf(MaxMagnitude(loaded.low[p]), MaxMagnitude(loaded.high[p])));
  }
  // The lanes that have the same place in the warp's lines have the same group.
#pragma unroll
  for (int step = kLineLanes; step < kWarpSize; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  const float scale = Fp8Scale(largest);
  // Of line i of the first part's, scales 2 i and 2 i + 1.
  static_assert(Fp8Lines::kScaleLines == kLinesAtOnce);
  const float even = __shfl_sync(0xffffffffu, scale, 2 * LineOfWarp());
  const float odd = __shfl_sync(0xffffffffu, scale, 2 * LineOfWarp() + 1);
  const std::uint64_t scales = __float_as_uint(even) | std::uint64_t{__float_as_uint(odd)} << 32;
  Packed packed;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    packed.data[p] = LaneDataOf(CastToFp8(loaded.low[p], loaded.high[p], 1.0f / scale));
    if (IsTail()) packed.data[p] = {p == 0 ? scales : loaded.note[p].Word(), use};
  }
  return packed;
}

__device__ Packed PackPlain(const Loaded& loaded, std::uint64_t use) {
  Packed packed;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    packed.data[p] = LaneDataOf(loaded.low[p]);
    if (!IsTail()) continue;
    const LineTail& tail = loaded.tail[p];
    const std::uint64_t half = LaneDataOf(HalfOf(loaded.low[p], tail.half)).data;
    packed.data[p] = {tail.note >= 0 ? loaded.note[p].Word() : half, use};
  }
  return packed;
}

// Pushes a unit of a token's row to all of its ranks but this one, where its notes are enough.
template <RowPayload kPayload, typename Lines>
__device__ void PushUnit(const CudaDispatchArgs& args, const AreaUse& use, const Ranks& ranks,
                         const Lines& lines, int unit, int token, const Loaded& loaded) {
  const int num_ranks = args.area.num_ranks;
  const int own_rank = args.area.rank;
  Packed packed;
  if constexpr (kPayload == RowPayload::kFp8) {
    packed = PackFp8(loaded, use.use);
  } else {
    packed = PackPlain(loaded, use.use);
  }
  const int positions = LaneOfWarp() < num_ranks ? ranks.PositionOf(token, LaneOfWarp()) : -1;
  int rank = own_rank;
#pragma unroll 1
  for (int i = 1; i < num_ranks; ++i) {
    rank = rank + 1 < num_ranks ? rank + 1 : 0;
    const int position = __shfl_sync(0xffffffffu, positions, rank);
    if (position < 0) continue;
    std::byte* row =
        LineRow(args.area.heap[rank] + use.byte_offset, args.area.layout, own_rank, position);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int line = LineOf(unit, p);
      StoreLine(line < lines.count(), row + line * kLineBytes, packed.data[p]);
    }
  }
  const int own_position = __shfl_sync(0xffffffffu, positions, own_rank);
  if (own_position < 0) return;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    if (loaded.tail[p].note < 0) continue;
    StoreNote(args, loaded.note[p], loaded.tail[p].note, args.area.heap[own_rank] + use.byte_offset,
              args.row_base[own_rank] + own_position);
  }
}

// What one block does for the rank: what the rows' places are, and that the peers hear of them.
__device__ void KeepBooks(const CudaDispatchArgs& args, const AreaUse& use, const Ranks& ranks) {
  const AreaLayout& layout = args.area.layout;
  const int num_ranks = args.area.num_ranks;
  const int own_rank = args.area.rank;
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer < num_ranks) {
    const int rows = ranks.CountTo(peer, args.num_tokens);
    std::byte* area = args.area.heap[peer] + use.byte_offset;
    if (peer == own_rank) {
      reinterpret_cast<std::int32_t*>(area + layout.counts)[own_rank] = rows;
    } else {
      const LineHead head = {static_cast<std::uint32_t>(rows), 1};
      StoreLane(HeadOf(area, layout, own_rank), {head.Word(), use.use});
    }
    // A use in which they count expects those of all uses before. relaxed: nothing stands behind
    // it. system: the reader is another GPU.
    cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(
        *FlagOf(area + layout.arrivals, own_rank))
        .fetch_add(static_cast<std::uint64_t>(args.num_blocks), cuda::memory_order_relaxed);
  }
  const auto places = static_cast<int>(args.num_tokens) * num_ranks;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < places; i += kThreads) {
    args.send_position[i] = ranks.PositionOf(i / num_ranks, i % num_ranks);
  }
}

template <RowPayload kPayload>
__global__ void __launch_bounds__(kThreads)
    LineDispatchKernel(const __grid_constant__ CudaDispatchArgs args, int push_blocks) {
  __shared__ Ranks ranks;
  AllowNextKernel();
  const int num_blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  const bool pushes = block < push_blocks;
  // A block alone does both.
  const int receive_blocks = max(num_blocks - push_blocks, 1);
  // The first of those that wait for peers: whichever of them run, the peers hear of this rank.
  const bool keeps_books = block == num_blocks - receive_blocks;
  const auto lines = LinesOf<kPayload>(args);
  const int num_units = CeilDivide(lines.count(), kUnitLines);
  const int num_pushes = pushes ? static_cast<int>(args.num_tokens) * num_units : 0;
  const AreaUse use = CurrentUse(args.area, 0);
  bool placed = false;
#pragma unroll 1
  for (int i = GridWarp(push_blocks); !placed || i < num_pushes; i += push_blocks * kWarps) {
    const int token = i / num_units;
    const int unit = i - token * num_units;
    // The first unit, the ids and the use's number are on their way together.
    Loaded loaded;
    if (i < num_pushes) loaded = Load<kPayload>(args, lines, unit, token);
    if (!placed) {
      if (pushes || keeps_books) ranks.Fill(args);
      __syncthreads();
      AdvanceUse(args.area, 0);  // No thread waits for the one that does it.
      if (keeps_books) KeepBooks(args, use, ranks);
      placed = true;
    }
    if (i < num_pushes) PushUnit<kPayload>(args, use, ranks, lines, unit, token, loaded);
  }
  if (block < num_blocks - receive_blocks) return;
  Receive<kPayload>(args, use, GridWarp(receive_blocks, num_blocks - receive_blocks),
                    receive_blocks * kWarps);
}

}  // namespace

absl::Status LoadLineDispatchKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(LineDispatchKernel<RowPayload::kCopy>));
  return LoadKernel(LineDispatchKernel<RowPayload::kFp8>);
}

cudaError_t LaunchLineDispatch(const CudaDispatchArgs& args, cudaStream_t stream) {
  const int push_blocks = std::max(args.num_blocks * kPushShare / 8, 1);
  if (args.payload == RowPayload::kFp8) {
    LineDispatchKernel<RowPayload::kFp8>
        <<<args.num_blocks, kThreads, 0, stream>>>(args, push_blocks);
  } else {
    LineDispatchKernel<RowPayload::kCopy>
        <<<args.num_blocks, kThreads, 0, stream>>>(args, push_blocks);
  }
  return cudaGetLastError();
}

}  // namespace epserve::runtime
