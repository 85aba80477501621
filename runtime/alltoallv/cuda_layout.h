// Where everything stands in a rank's GPU heap, in one place. The heap holds a barrier line and
// then equally built areas: one a slot, and two for the decode path (double-buffered). All ranks
// have the same layout, so an offset here is an offset in every peer's heap.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_LAYOUT_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_LAYOUT_H_

#include <algorithm>
#include <cstdint>

#include "runtime/alltoallv/line_format.h"

namespace epserve::runtime {

inline constexpr int kMaxCudaRanks = 8;        // GPUs of one host
inline constexpr int kFp8GroupElements = 128;  // elements that share one fp32 scale
inline constexpr int kFlagStrideBytes =
    128;  // a flag a cache line: sources do not disturb each other

inline constexpr int kLinkLineBytes = 128;  // what one store of a warp's can send at most, aligned

// Form of a row on its way; kFp8: a bf16 row is cast to e4m3 with a scale a group.
enum class RowPayload { kCopy, kFp8 };

// Byte offsets from an area's start.
struct AreaLayout {
  std::int64_t arrivals;   // u64 [kMaxCudaRanks], kFlagStrideBytes apart; blocks that have arrived
  std::int64_t counts;     // i32 [kMaxCudaRanks]; rows from each source (decode path)
  std::int64_t row_flags;  // u64 [partial_capacity]; use of the area that wrote the partial row
  std::int64_t count_flags;    // u64 [kMaxCudaRanks], kFlagStrideBytes apart; batch counted
  std::int64_t count_records;  // [kMaxCudaRanks] what each source counted (see DeviceCountRecord)
  std::int64_t count_record_bytes;
  std::int64_t source_token;  // i32 [row_capacity]; this rank's own rows: token index
  // A row's notes: i32 [K] expert local to the receiver, -1: elsewhere; then f32 [K] its weight.
  // They lie in one line of the link's, for short stores cost it as much as long ones; so do 32 of
  // a row's scales.
  std::int64_t notes;  // [row_capacity, note_bytes]
  std::int64_t note_bytes;
  std::int64_t scales;  // f32 [H / 128] a row, scale_bytes apart; fp8 only
  std::int64_t scale_bytes;
  std::int64_t rows;        // [row_capacity, row bytes]
  std::int64_t partials;    // [partial_capacity, H] the batch's type
  std::int64_t line_heads;  // Numbered [kMaxCudaRanks], kFlagStrideBytes apart; how a source sends
  std::int64_t line_rows;   // [R, line_capacity, line_row_bytes]
  std::int64_t line_row_bytes;
  std::int64_t line_partials;  // [R, line_capacity, line_partial_bytes]
  std::int64_t line_partial_bytes;
  std::int64_t bytes;  // of the whole area, a multiple of 256
  std::int64_t row_capacity;
  std::int64_t partial_capacity;
  std::int64_t line_capacity;  // tokens of a rank that travel as lines; 0: none do
};

// 8 bytes, and the number of the use of the area that they belong to, written and read as a whole.
struct alignas(16) Numbered {
  std::uint64_t data;
  std::uint64_t use;
};
// Of a rank; a block that dispatches keeps where each goes.
inline constexpr int kMaxLineTokens = 512;

struct CudaHeapShape {
  int num_ranks;
  int num_slots;
  int max_topk;
  std::int64_t hidden;
  std::int64_t max_batch_tokens;   // over all ranks, prefill path
  std::int64_t max_decode_tokens;  // a rank, decode path
  int max_element_bytes;           // 4 where FP32 batches are served, else 2
  std::int64_t num_experts;        // E; 0: ranks do not exchange counts
  std::int64_t line_tokens = 0;    // a rank, decode path: up to so many travel as lines
};

// What a source tells every rank of its shard. Behind it: i32 [R] rows to each rank, then i32 [E]
// token-expert pairs.
struct DeviceCountRecord {
  std::uint64_t sequence;  // of the batch
};

constexpr std::int64_t AlignUp(std::int64_t value, std::int64_t to) {
  return (value + to - 1) / to * to;
}

constexpr AreaLayout MakeAreaLayout(const CudaHeapShape& shape, std::int64_t row_capacity,
                                    std::int64_t partial_capacity, std::int64_t line_capacity = 0) {
  AreaLayout a{};
  std::int64_t at = 0;
  const auto take = [&at](std::int64_t bytes) {
    const std::int64_t start = at;
    at = AlignUp(at + bytes, 256);
    return start;
  };
  a.row_capacity = row_capacity;
  a.partial_capacity = partial_capacity;
  a.line_capacity = line_capacity;
  a.arrivals = take(std::int64_t{kMaxCudaRanks} * kFlagStrideBytes);
  a.counts = take(std::int64_t{kMaxCudaRanks} * 4);
  a.row_flags = take(partial_capacity * 8);
  a.count_flags = take(std::int64_t{kMaxCudaRanks} * kFlagStrideBytes);
  a.count_record_bytes =
      AlignUp(static_cast<std::int64_t>(sizeof(DeviceCountRecord)) +
                  (static_cast<std::int64_t>(shape.num_ranks) + shape.num_experts) * 4,
              kFlagStrideBytes);
  a.count_records = take(kMaxCudaRanks * a.count_record_bytes);
  a.source_token = take(row_capacity * 4);
  a.note_bytes = AlignUp(std::int64_t{shape.max_topk} * 8, kLinkLineBytes / 2);
  a.notes = take(row_capacity * a.note_bytes);
  a.scale_bytes = AlignUp(shape.hidden / kFp8GroupElements * 4, kLinkLineBytes);
  a.scales = take(row_capacity * a.scale_bytes);
  a.rows = take(row_capacity * shape.hidden * shape.max_element_bytes);
  a.partials = take(partial_capacity * shape.hidden * shape.max_element_bytes);
  const auto vectors = static_cast<int>(shape.hidden * shape.max_element_bytes / 16);
  const auto groups = static_cast<int>(shape.hidden / kFp8GroupElements);
  const int notes = NumNotes(shape.max_topk);
  a.line_row_bytes = std::max(PlainLines(vectors, notes).count(), Fp8Lines(groups, notes).count()) *
                     std::int64_t{kLineBytes};
  a.line_partial_bytes = PlainLines(vectors, 0).count() * std::int64_t{kLineBytes};
  const std::int64_t line_area_rows = shape.num_ranks * line_capacity;
  a.line_heads = take(line_capacity > 0 ? std::int64_t{kMaxCudaRanks} * kFlagStrideBytes : 0);
  a.line_rows = take(line_area_rows * a.line_row_bytes);
  a.line_partials = take(line_area_rows * a.line_partial_bytes);
  a.bytes = at;
  return a;
}

struct CudaHeapLayout {
  AreaLayout slot;       // rows of all sources one after another, or a place for each one's shard
  AreaLayout decode;     // fixed: max_decode_tokens rows for each source
  std::int64_t barrier;  // u64 [kMaxCudaRanks], kFlagStrideBytes apart
  std::int64_t slots;    // first slot area
  std::int64_t decodes;  // first of the two decode areas
  std::int64_t bytes;
};

constexpr CudaHeapLayout MakeCudaHeapLayout(const CudaHeapShape& shape) {
  CudaHeapLayout layout{};
  const std::int64_t shard = (shape.max_batch_tokens + shape.num_ranks - 1) / shape.num_ranks;
  // A whole shard of each source, wherever its rows go: they have places before they are counted.
  layout.slot = MakeAreaLayout(shape, shape.num_ranks * shard, shape.num_ranks * shard);
  layout.decode = MakeAreaLayout(shape, shape.num_ranks * shape.max_decode_tokens,
                                 shape.num_ranks * shape.max_decode_tokens,
                                 std::min(shape.line_tokens, shape.max_decode_tokens));
  layout.barrier = 0;
  layout.slots = AlignUp(std::int64_t{kMaxCudaRanks} * kFlagStrideBytes, 256);
  layout.decodes = layout.slots + shape.num_slots * layout.slot.bytes;
  layout.bytes = layout.decodes + 2 * layout.decode.bytes;
  return layout;
}

static_assert(MakeCudaHeapLayout({4, 2, 8, 7168, 16384, 512, 2, 256}).slot.rows % 256 == 0);
static_assert(MakeCudaHeapLayout({4, 2, 8, 7168, 16384, 512, 2, 256}).slot.partial_capacity ==
              4096 * 4);

static_assert(MakeCudaHeapLayout({2, 2, 8, 7168, 16384, 64, 2, 256, 128}).decode.line_capacity ==
              64);
// 121 lines of a row and 120 of a sum, 15.5 and 15.4 KB.
static_assert(MakeCudaHeapLayout({4, 2, 8, 7168, 16384, 512, 2, 256, 128}).decode.line_row_bytes ==
              121 * 128);
static_assert(MakeCudaHeapLayout({4, 2, 8, 7168, 16384, 512, 2, 256, 128})
                  .decode.line_partial_bytes == 120 * 128);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_LAYOUT_H_
