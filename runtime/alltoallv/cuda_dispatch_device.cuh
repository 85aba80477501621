// What the dispatch kernels share: who owns a token's experts, the cast to fp8, and the receiving
// end of what sources send as lines.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_DISPATCH_DEVICE_CUH_

#include <cuda_fp8.h>

#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/cuda_line_device.cuh"
#include "runtime/base/cuda_fp8.cuh"

namespace epserve::runtime {

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
                                 const LineHead& head) {
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer >= args.area.num_ranks || peer == args.area.rank) return;
  std::byte* area = args.area.heap[peer] + use.byte_offset;
  StoreLane(HeadOf(area, args.area.layout, args.area.rank), {head.Word(), use.use});
}

__device__ inline void WaitForArrivals(const CudaDispatchArgs& args, const AreaUse& use,
                                       int source) {
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  WaitAtLeast(FlagOf(own + args.area.layout.arrivals, source),
              use.use * static_cast<std::uint64_t>(args.num_blocks), source, WaitStage::kDispatch,
              args.wait);
}

// A row's lines, as `args` has them.
template <RowPayload kPayload>
__device__ auto LinesOf(const CudaDispatchArgs& args) {
  const auto hidden = static_cast<int>(args.hidden);
  if constexpr (kPayload == RowPayload::kFp8) {
    return Fp8Lines(hidden / kFp8GroupElements, NumNotes(args.topk));
  } else {
    return PlainLines(hidden * (args.dtype == DataType::kFp32 ? 4 : 2) / 16, NumNotes(args.topk));
  }
}

// 16-byte vectors of a row as it travels.
template <RowPayload kPayload>
__device__ std::int64_t VectorsOf(const CudaDispatchArgs& args) {
  if (kPayload == RowPayload::kFp8) return args.hidden / 16;
  return args.hidden * (args.dtype == DataType::kFp32 ? 4 : 2) / 16;
}

// A note: a token's expert `note`, by its global id, and its weight; or the token's index.
struct Note {
  std::int32_t id = -1;
  float weight = 0.0f;

  __device__ std::uint64_t Word() const {
    return static_cast<std::uint32_t>(id) | std::uint64_t{__float_as_uint(weight)} << 32;
  }
  static __device__ Note Of(std::uint64_t word) {
    return {static_cast<std::int32_t>(word),
            __uint_as_float(static_cast<unsigned>(word >> 32))};
  }
};

// Puts a row's note where that of a row that does not come as lines would be.
__device__ inline void StoreNote(const CudaDispatchArgs& args, const Note& note, int index,
                                 std::byte* own, std::int64_t row) {
  const AreaLayout& layout = args.area.layout;
  if (index == args.topk) {
    reinterpret_cast<std::int32_t*>(own + layout.source_token)[row] = note.id;
    return;
  }
  const std::int32_t first = args.first_expert[args.area.rank];
  const bool here = note.id >= first && note.id < args.first_expert[args.area.rank + 1];
  ExpertNotes(own, layout, row)[index] = here ? note.id - first : -1;
  WeightNotes(own, layout, row, args.topk)[index] = note.weight;
}

// Puts what a tail has brought where that of a row that does not come as lines would be.
template <RowPayload kPayload>
__device__ void StoreTail(const CudaDispatchArgs& args, const LineTail& tail, std::uint64_t data,
                          std::byte* own, std::int64_t row) {
  const AreaLayout& layout = args.area.layout;
  if (tail.note >= 0) StoreNote(args, Note::Of(data), tail.note, own, row);
  if constexpr (kPayload == RowPayload::kFp8) {
    float* scales = RowScales(own, layout, row) + tail.scale;
    if (tail.num_scales > 0) scales[0] = __uint_as_float(static_cast<unsigned>(data));
    if (tail.num_scales > 1) scales[1] = __uint_as_float(static_cast<unsigned>(data >> 32));
  } else if (tail.vector >= 0) {
    auto* halves = reinterpret_cast<std::uint64_t*>(own + layout.rows) +
                   (row * VectorsOf<kPayload>(args) + tail.vector) * 2;
    halves[tail.half] = data;
  }
}

// Takes in one source's lines, as one of `stride` warps that do; or waits for its arrivals, where
// it sends none. Warps either put rows' vectors where they belong, four lines at a time and as many
// times on their way together as a lane has parts, or what the tails of 32 lines have brought. Out
// of line: the kernels that push before would else have fewer registers for that.
template <RowPayload kPayload>
__device__ __noinline__ void ReceiveFrom(const CudaDispatchArgs& args, AreaUse use, int source,
                                         int first, int stride) {
  constexpr int kParts = 4;
  constexpr int kUnitLines = kParts * kLinesAtOnce;
  const AreaLayout& layout = args.area.layout;
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const std::byte* head_from = HeadOf(own, layout, source);
  const auto lines = LinesOf<kPayload>(args);
  const int num_units = CeilDivide(lines.count(), kUnitLines);  // of vectors
  const int units_a_row = num_units + CeilDivide(lines.count(), kWarpSize);
  // A source has the same number of rows in every area.
  const std::int64_t first_row = source * (layout.row_capacity / args.area.num_ranks);
  bool told = false;  // What comes.
  LineHead head = {};
#pragma unroll 1
  for (int i = first;; i += stride) {
    const int row = i / units_a_row;
    const int unit = i - row * units_a_row;
    // Nothing of the kind can come; what does, the first warp waits to be told all the same.
    if (row >= layout.line_capacity && (told || first != 0)) break;
    const bool takes_tails = unit >= num_units;
    const int line = takes_tails ? (unit - num_units) * kWarpSize + LaneOfWarp()
                                 : unit * kUnitLines + LineOfWarp();
    const std::byte* from = LineRow(own, layout, source, row) + line * kLineBytes;
    unsigned missing = 0;  // bit p: part p has not come
    if (row < layout.line_capacity) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (line + p * kLinesAtOnce < lines.count()) missing |= 1u << p;
      }
      if (takes_tails) missing &= 1u;
    }
    bool here = false;
    // The row is looked for before it is known to come: it may be there as soon as the head.
    const auto ready = [&] {
      LaneData head_found = {};
      if (!told) head_found = LoadLane(head_from);
      if (takes_tails) {
        LaneData data;
        if (missing != 0) data = LoadLane(from + kTailLane * sizeof(LaneData));
        if (missing != 0 && data.use == use.use) {
          missing = 0;
          StoreTail<kPayload>(args, lines.TailAt(line), data.data, own, first_row + row);
        }
      } else {
        LaneData data[kParts];
        auto* to = reinterpret_cast<uint4*>(own + layout.rows) +
                   (first_row + row) * VectorsOf<kPayload>(args);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          LoadLine((missing >> p & 1u) != 0, from + p * kLinesAtOnce * kLineBytes, &data[p]);
        }
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          const bool has_come = HasCome((missing >> p & 1u) != 0, data[p], use.use);
          const int vector = lines.VectorAt(line + p * kLinesAtOnce, LaneOfLine());
          if (has_come && !IsTail() && vector >= 0) to[vector] = VectorOf(data[p]);
          if (has_come) missing &= ~(1u << p);
        }
      }
      if (!told && __all_sync(0xffffffffu, head_found.use == use.use)) {
        told = true;
        head = LineHead::Of(head_found.data);
      }
      here = row < layout.line_capacity && __all_sync(0xffffffffu, missing == 0);
      return here || (told && row >= RowsOf(head, layout));
    };
    if (!WarpWaitUntil(ready, source, WaitStage::kDispatch, args.wait)) return;
    if (!here) break;
    if (told && i + stride >= RowsOf(head, layout) * units_a_row) break;
  }
  if (first != 0 || LaneOfWarp() != 0) return;
  if (head.as_lines != 0) {
    reinterpret_cast<std::int32_t*>(own + layout.counts)[source] = RowsOf(head, layout);
  } else {
    WaitForArrivals(args, use, source);
  }
}

// Takes in what all sources send, as one of `num_warps` warps, of which there are more than ranks.
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
