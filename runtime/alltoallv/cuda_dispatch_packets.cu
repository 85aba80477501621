// Dispatch of few tokens: rows travel as packets (see cuda_packet_device.cuh). Every warp pushes
// chunks of rows, whose place it works out by itself from the ids of all tokens, and takes in
// chunks that peers push; no warp waits for another of its rank. A receiver puts the rows where
// those that do not come as packets are, so that what follows need not know.
#include "runtime/alltoallv/cuda_dispatch_device.cuh"
#include "runtime/alltoallv/cuda_dispatch_packets.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kWarps >= kMaxCudaRanks, "a block alone has a warp for every peer");

// Lane t holds token t's ranks.
struct Ranks {
  unsigned mask;

  __device__ unsigned TokensTo(int rank) const {
    return __ballot_sync(0xffffffffu, (mask >> rank) & 1u);
  }
  __device__ unsigned Of(int token) const { return __shfl_sync(0xffffffffu, mask, token); }
};

__device__ int PositionIn(unsigned tokens, int token) {
  return __popc(tokens & ((1u << token) - 1u));
}

// What a lane pushes of a chunk, as it is loaded.
struct Loaded {
  uint4 low = {};
  uint4 high = {};  // only where the row is cast
  std::int32_t expert = -1;
  float weight = 0.0f;
};

template <RowPayload kPayload>
__device__ Loaded Load(const CudaDispatchArgs& args, const PacketChunk<kPayload>& chunk,
                       int token) {
  constexpr int kVectors = kPayload == RowPayload::kFp8 ? 2 : 1;
  Loaded loaded;
  if (chunk.has_piece()) {
    const auto* row = static_cast<const uint4*>(args.x) +
                      std::int64_t{token} * PacketChunk<kPayload>::PiecesOf(args) * kVectors;
    loaded.low = __ldcs(row + chunk.piece() * kVectors);
    if constexpr (kVectors == 2) loaded.high = __ldcs(row + chunk.piece() * kVectors + 1);
  }
  if (chunk.has_note() && chunk.note() < args.topk) {
    loaded.expert = args.topk_ids[std::int64_t{token} * args.topk + chunk.note()];
    loaded.weight = args.topk_weights[std::int64_t{token} * args.topk + chunk.note()];
  }
  return loaded;
}

__device__ std::int32_t LocalExpert(const CudaDispatchArgs& args, std::int32_t expert, int rank) {
  const bool there = expert >= args.first_expert[rank] && expert < args.first_expert[rank + 1];
  return there ? expert - args.first_expert[rank] : -1;
}

// The lane's note of a row for rank `rank`, as a packet's data.
__device__ std::uint64_t NoteFor(const CudaDispatchArgs& args, const Loaded& loaded, int note,
                                 int token, int rank) {
  const std::int32_t low = note == kMaxCudaTopk ? token : LocalExpert(args, loaded.expert, rank);
  return static_cast<std::uint32_t>(low) | std::uint64_t{__float_as_uint(loaded.weight)} << 32;
}

// Pushes a chunk of a token's row to all of its ranks but this one, where its notes are enough.
template <RowPayload kPayload>
__device__ void PushChunk(const CudaDispatchArgs& args, const AreaUse& use, const Ranks& ranks,
                          int token, const PacketChunk<kPayload>& chunk, const Loaded& loaded) {
  uint4 piece = loaded.low;
  float scale = 0.0f;
  if constexpr (kPayload == RowPayload::kFp8) {
    float largest = fmaxf(MaxMagnitude(loaded.low), MaxMagnitude(loaded.high));
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    scale = Fp8Scale(largest);
    piece = CastToFp8(loaded.low, loaded.high, 1.0f / scale);
  }
  const unsigned token_ranks = ranks.Of(token);
  for (int i = 1; i < args.area.num_ranks; ++i) {
    const int rank = (args.area.rank + i) % args.area.num_ranks;
    const int position = PositionIn(ranks.TokensTo(rank), token);
    if (((token_ranks >> rank) & 1u) == 0) continue;
    std::byte* area = args.area.heap[rank] + use.byte_offset;
    Packet* to = PacketRow(area, args.area.layout, args.area.rank, position);
    if (chunk.has_piece()) StoreVector(to + chunk.piece_packet(), piece, use.use);
    if (chunk.has_scale()) {
      StorePacket(to + chunk.scale_packet(), __float_as_uint(scale), use.use);
    }
    if (chunk.has_note()) {
      StorePacket(to + chunk.note_packet(), NoteFor(args, loaded, chunk.note(), token, rank),
                  use.use);
    }
  }
  const int own_rank = args.area.rank;
  const int own_position = PositionIn(ranks.TokensTo(own_rank), token);
  if (chunk.has_note() && ((token_ranks >> own_rank) & 1u) != 0) {
    StoreNote(args, NoteFor(args, loaded, chunk.note(), token, own_rank), chunk.note(),
              args.area.heap[own_rank] + use.byte_offset, args.row_base[own_rank] + own_position);
  }
}

// What one warp does for the rank: what the rows' places are, and that the peers hear of them.
__device__ void KeepBooks(const CudaDispatchArgs& args, const AreaUse& use, const Ranks& ranks) {
  const AreaLayout& layout = args.area.layout;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int own_rank = args.area.rank;
  int rows = 0;  // to rank `lane`
  for (int r = 0; r < args.area.num_ranks; ++r) {
    const unsigned tokens = ranks.TokensTo(r);
    if (lane == r) rows = __popc(tokens);
    const bool goes = ((ranks.mask >> r) & 1u) != 0;
    if (lane < args.num_tokens) {
      args.send_position[lane * args.area.num_ranks + r] = goes ? PositionIn(tokens, lane) : -1;
    }
  }
  std::byte* own = args.area.heap[own_rank] + use.byte_offset;
  if (lane < args.area.num_ranks) {
    std::byte* area = args.area.heap[lane] + use.byte_offset;
    if (lane == own_rank) {
      reinterpret_cast<std::int32_t*>(own + layout.counts)[own_rank] = rows;
    } else {
      const PacketHead head = {static_cast<std::uint32_t>(rows), 1};
      StorePacket(HeadOf(area, layout, own_rank), head.Word(), use.use);
    }
    // A use in which they count expects those of all uses before. relaxed: nothing stands behind
    // it. system: the reader is another GPU.
    cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(
        *FlagOf(area + layout.arrivals, own_rank))
        .fetch_add(static_cast<std::uint64_t>(args.num_blocks), cuda::memory_order_relaxed);
  }
}

template <RowPayload kPayload>
__global__ void __launch_bounds__(kThreads)
    PacketDispatchKernel(const __grid_constant__ CudaDispatchArgs args) {
  using Chunk = PacketChunk<kPayload>;
  AllowNextKernel();
  const int warp = GridWarp(static_cast<int>(gridDim.x));
  const int num_warps = static_cast<int>(gridDim.x) * kWarps;
  const int num_chunks = Chunk::CountOf(args);
  const int num_pushes = static_cast<int>(args.num_tokens) * num_chunks;
  // The first chunk, the ids and the use's number are on their way together.
  Loaded first;
  if (warp < num_pushes) {
    first = Load(args, Chunk(args, warp % num_chunks), warp / num_chunks);
  }
  const std::int64_t lane = threadIdx.x % kWarpSize;
  const Ranks ranks = {lane < args.num_tokens ? RankMask(args, lane) : 0u};
  const AreaUse use = BeginUse(args.area, 0);
  // The warps in the middle have nothing to push or to take in, where tokens are few.
  if (warp == num_warps / 2) KeepBooks(args, use, ranks);
  for (int i = warp; i < num_pushes; i += num_warps) {
    const int token = i / num_chunks;
    const Chunk chunk(args, i % num_chunks);
    PushChunk(args, use, ranks, token, chunk, i == warp ? first : Load(args, chunk, token));
  }
  Receive<kPayload>(args, use, num_warps - 1 - warp, num_warps);
}

}  // namespace

absl::Status LoadPacketDispatchKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(PacketDispatchKernel<RowPayload::kCopy>));
  return LoadKernel(PacketDispatchKernel<RowPayload::kFp8>);
}

cudaError_t LaunchPacketDispatch(const CudaDispatchArgs& args, cudaStream_t stream) {
  if (args.payload == RowPayload::kFp8) {
    PacketDispatchKernel<RowPayload::kFp8><<<args.num_blocks, kThreads, 0, stream>>>(args);
  } else {
    PacketDispatchKernel<RowPayload::kCopy><<<args.num_blocks, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace epserve::runtime
