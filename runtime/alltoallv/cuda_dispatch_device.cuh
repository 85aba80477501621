// What the dispatch kernels share: who owns a token's experts, the cast to fp8, and the receiving
// end of what sources send as packets.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_DEVICE_CUH_

#include <cuda_fp8.h>

#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/cuda_packet_device.cuh"
#include "runtime/base/cuda_fp8.cuh"

namespace epserve::runtime {

inline constexpr int kWarpSize = 32;

__device__ inline int OwnerOf(int expert, const CudaDispatchArgs& args) {
  int owner = 0;
#pragma unroll
  for (int r = 1; r < kMaxCudaRanks; ++r) {
    owner += (r < args.area.num_ranks && expert >= args.first_expert[r]) ? 1 : 0;
  }
  return owner;
}

// Bit r is set where rank r owns one of the token's experts.
__device__ inline unsigned RankMask(const CudaDispatchArgs& args, std::int64_t token) {
  unsigned mask = 0;
  const std::int32_t* ids = args.topk_ids + token * args.topk;
  if (args.topk % 4 == 0) {
    for (int k = 0; k < args.topk; k += 4) {
      const int4 four = *reinterpret_cast<const int4*>(ids + k);
      if (four.x >= 0) mask |= 1u << OwnerOf(four.x, args);
      if (four.y >= 0) mask |= 1u << OwnerOf(four.y, args);
      if (four.z >= 0) mask |= 1u << OwnerOf(four.z, args);
      if (four.w >= 0) mask |= 1u << OwnerOf(four.w, args);
    }
  } else {
    for (int k = 0; k < args.topk; ++k) {
      if (ids[k] >= 0) mask |= 1u << OwnerOf(ids[k], args);
    }
  }
  return mask;
}

// Sixteen bf16 values to e4m3, given what they are multiplied with.
__device__ inline uint4 CastToFp8(const uint4& low, const uint4& high, float inverse_scale) {
  uint4 packed;
  auto* out = reinterpret_cast<__nv_fp8x2_storage_t*>(&packed);
  const uint4 halves[2] = {low, high};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&halves[h]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 f = __bfloat1622float2(pairs[i]);
      f.x *= inverse_scale;
      f.y *= inverse_scale;
      out[h * 4 + i] = __nv_cvt_float2_to_fp8x2(f, __NV_SATFINITE, __NV_E4M3);
    }
  }
  return packed;
}

__device__ inline float MaxMagnitude(const uint4& v) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&v);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __bfloat1622float2(pairs[i]);
    largest = fmaxf(largest, fmaxf(fabsf(f.x), fabsf(f.y)));
  }
  return largest;
}

// Tells every peer how this rank's rows of the use come. Called by at least R threads of one block.
__device__ inline void TellPeers(const CudaDispatchArgs& args, const AreaUse& use,
                                 const PacketHead& head) {
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer >= args.area.num_ranks || peer == args.area.rank) return;
  std::byte* area = args.area.heap[peer] + use.byte_offset;
  StorePacket(HeadOf(area, args.area.layout, args.area.rank), head.Word(), use.use);
}

__device__ inline void WaitForArrivals(const CudaDispatchArgs& args, const AreaUse& use,
                                       int source) {
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  WaitAtLeast(FlagOf(own + args.area.layout.arrivals, source),
              use.use * static_cast<std::uint64_t>(args.num_blocks), source, WaitStage::kDispatch,
              args.wait);
}

// 32 pieces of 16 bytes of a row, one a lane, with what belongs to them: a group's scale to every
// eighth piece, the row's experts and index to the first 32.
template <RowPayload kPayload>
class PacketChunk {
 public:
  // Pieces of a row.
  static __device__ int PiecesOf(const CudaDispatchArgs& args) {
    const int element_bytes = args.dtype == DataType::kFp32 ? 4 : 2;
    const auto hidden = static_cast<int>(args.hidden);
    return kPayload == RowPayload::kFp8 ? hidden / 16 : hidden * element_bytes / 16;
  }
  static __device__ int CountOf(const CudaDispatchArgs& args) {
    return (PiecesOf(args) + kWarpSize - 1) / kWarpSize;
  }

  __device__ PacketChunk(const CudaDispatchArgs& args, int chunk)
      : lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        piece_(chunk * kWarpSize + lane_),
        num_scales_(kPayload == RowPayload::kFp8 ? static_cast<int>(args.hidden) / kFp8GroupElements
                                                 : 0),
        has_piece_(piece_ < PiecesOf(args)),
        has_scale_(kPayload == RowPayload::kFp8 && has_piece_ && lane_ % 8 == 0),
        has_note_(chunk == 0 && (lane_ < args.topk || lane_ == kMaxCudaTopk)) {}

  __device__ bool has_piece() const { return has_piece_; }
  __device__ bool has_scale() const { return has_scale_; }
  __device__ bool has_note() const { return has_note_; }
  __device__ int piece() const { return piece_; }
  __device__ int scale() const { return piece_ / 8; }
  __device__ int note() const { return lane_; }

  // Where they are among the row's packets.
  __device__ int piece_packet() const { return kPacketsBeforeScales + num_scales_ + 2 * piece_; }
  __device__ int scale_packet() const { return kPacketsBeforeScales + scale(); }
  __device__ int note_packet() const { return lane_; }

 private:
  int lane_;
  int piece_;
  int num_scales_;
  bool has_piece_;
  bool has_scale_;
  bool has_note_;
};

// A lane's packets of a chunk.
struct LanePackets {
  PacketPair piece;
  Packet scale;
  Packet note;
};

// Looks for a chunk of a row; true in the lanes whose packets of the use are all there.
template <RowPayload kPayload>
__device__ bool Look(const PacketChunk<kPayload>& chunk, const Packet* row, std::uint64_t use,
                     LanePackets* found) {
  *found = {{{0, use}, {0, use}}, {0, use}, {0, use}};
  if (chunk.has_piece()) found->piece = LoadPair(row + chunk.piece_packet());
  if (chunk.has_scale()) found->scale = LoadPacket(row + chunk.scale_packet());
  if (chunk.has_note()) found->note = LoadPacket(row + chunk.note_packet());
  return found->piece.IsOf(use) && found->scale.use == use && found->note.use == use;
}

// Puts a row's note where that of a row that is no packets would be.
__device__ inline void StoreNote(const CudaDispatchArgs& args, std::uint64_t data, int note,
                                 std::byte* own, std::int64_t row) {
  const AreaLayout& layout = args.area.layout;
  const auto low = static_cast<std::int32_t>(data);
  if (note == kMaxCudaTopk) {
    reinterpret_cast<std::int32_t*>(own + layout.source_token)[row] = low;
    return;
  }
  ExpertNotes(own, layout, row)[note] = low;
  WeightNotes(own, layout, row, args.topk)[note] =
      __uint_as_float(static_cast<unsigned>(data >> 32));
}

// Puts a chunk where a row that is no packets would be.
template <RowPayload kPayload>
__device__ void Unpack(const CudaDispatchArgs& args, const PacketChunk<kPayload>& chunk,
                       const LanePackets& found, std::byte* own, std::int64_t row) {
  const AreaLayout& layout = args.area.layout;
  if (chunk.has_piece()) {
    auto* rows = reinterpret_cast<uint4*>(own + layout.rows);
    rows[row * PacketChunk<kPayload>::PiecesOf(args) + chunk.piece()] = found.piece.Vector();
  }
  if (chunk.has_scale()) {
    RowScales(own, layout, row)[chunk.scale()] =
        __uint_as_float(static_cast<unsigned>(found.scale.data));
  }
  if (chunk.has_note()) StoreNote(args, found.note.data, chunk.note(), own, row);
}

// Takes in one source's packets, as one of `stride` warps that do; or waits for its arrivals, where
// it sends none. Out of line, because the kernel for many rows has all of its registers in use.
template <RowPayload kPayload>
__device__ __noinline__ void ReceiveFrom(const CudaDispatchArgs& args, AreaUse use, int source,
                                         int first, int stride) {
  const AreaLayout& layout = args.area.layout;
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const Packet* head_packet = HeadOf(own, layout, source);
  const int num_chunks = PacketChunk<kPayload>::CountOf(args);
  bool told = false;  // What comes.
  PacketHead head = {};
  for (int i = first; !told || i < RowsOf(head, layout) * num_chunks; i += stride) {
    const int row = i / num_chunks;
    const PacketChunk<kPayload> chunk(args, i % num_chunks);
    const Packet* packets = PacketRow(own, layout, source, row);
    LanePackets found;
    bool here = false;
    // The row is looked for before it is known to come: it may be there as soon as the head.
    const auto ready = [&] {
      const Packet head_found = LoadPacket(head_packet);
      here = row < layout.packet_capacity;
      if (here) here = Look(chunk, packets, use.use, &found);
      here = __all_sync(0xffffffffu, here);
      told = __all_sync(0xffffffffu, head_found.use == use.use);
      if (told) head = PacketHead::Of(head_found.data);
      return here || (told && row >= RowsOf(head, layout));
    };
    if (!WarpWaitUntil(ready, source, WaitStage::kDispatch, args.wait)) return;
    if (!here) break;
    // A source has the same number of rows in every area.
    const std::int64_t per_source = layout.row_capacity / args.area.num_ranks;
    Unpack(args, chunk, found, own, source * per_source + row);
  }
  if (first != 0 || threadIdx.x % kWarpSize != 0) return;
  if (head.as_packets != 0) {
    reinterpret_cast<std::int32_t*>(own + layout.counts)[source] = RowsOf(head, layout);
  } else {
    WaitForArrivals(args, use, source);
  }
}

// Takes in what all sources send. Called by all warps of the grid, of which there are more than
// ranks.
template <RowPayload kPayload>
__device__ void Receive(const CudaDispatchArgs& args, const AreaUse& use, int warp, int num_warps) {
  const int num_peers = args.area.num_ranks - 1;
  if (num_peers == 0) return;
  const int turn = warp % num_peers;
  ReceiveFrom<kPayload>(args, use, (args.area.rank + 1 + turn) % args.area.num_ranks,
                        warp / num_peers, (num_warps - turn + num_peers - 1) / num_peers);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_DEVICE_CUH_
