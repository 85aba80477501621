// Where everything stands in a rank's heap; the one table of offsets. Pure and constexpr.
//
//   header page | slot 0 | slot 1 | ...
//   slot: Arrival[R] | partials_ready | count records[R] | receive rows | local experts | weights |
//         partial rows
//
// Sizes are those of 4-byte elements and of max_topk; a batch of a narrower type or a smaller K
// packs its rows and its metadata closer, from the same begin.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_LAYOUT_H_
#define EPSERVE_RUNTIME_ALLTOALLV_LAYOUT_H_

#include <algorithm>
#include <cstdint>

#include "runtime/alltoallv/exchange.h"
#include "runtime/symmetric/shared_flag.h"
#include "runtime/symmetric/symmetric_heap.h"

namespace epserve::runtime {

// Each region begins on a cache line, so that regions of different writers never share one.
inline constexpr std::uint64_t kRegionAlignment = 64;

constexpr std::uint64_t AlignUp(std::uint64_t bytes, std::uint64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// What one source tells one destination about a batch, written before its flag is raised. The
// destination compares it with its own count matrix.
struct Arrival {
  SharedFlag flag;  // The sequence of the last batch whose rows are all there.
  std::uint64_t sequence;
  std::int64_t num_rows;        // From this source to this destination.
  std::int64_t receive_offset;  // Of the first of them.
  std::int32_t topk;
  std::int32_t dtype;
  std::uint8_t unused[32];
};
static_assert(sizeof(Arrival) == 128 && sizeof(Arrival) % kRegionAlignment == 0);

// What one source tells every rank about its shard of a batch, where the ranks exchange the counts;
// written before its flag is raised. Behind it stand i32 [R], the source's rows to each rank, and
// i32 [E], its token-expert pairs by expert.
struct CountRecord {
  SharedFlag flag;  // The sequence of the last batch whose counts are all there.
  std::uint64_t sequence;
  std::uint8_t unused[56];
};
static_assert(sizeof(CountRecord) == 128 && sizeof(CountRecord) % kRegionAlignment == 0);

struct HeapLayout {
  // From the begin of the slot.
  std::uint64_t arrivals_offset = 0;        // Arrival [R], written by the sources
  std::uint64_t partials_ready_offset = 0;  // SharedFlag, raised by the owner
  std::uint64_t counts_offset = 0;          // CountRecord [R] and their counts, by the sources
  std::uint64_t count_record_bytes = 0;     // from one record to the next
  std::uint64_t receive_rows_offset = 0;    // [max_batch_tokens] rows, each on a cache line
  std::uint64_t local_experts_offset = 0;   // [max_batch_tokens, K] i32
  std::uint64_t weights_offset = 0;         // [max_batch_tokens, K] f32
  std::uint64_t partial_rows_offset = 0;    // [max_batch_tokens, H], written by the owner
  std::uint64_t sums_offset = 0;  // in the partial rows' place, behind them where they have 2 bytes
  std::uint64_t slot_bytes = 0;
  // Of the heap.
  std::uint64_t heap_bytes = 0;

  constexpr std::uint64_t SlotOffset(int slot) const {
    return kHeapHeaderBytes + static_cast<std::uint64_t>(slot) * slot_bytes;
  }
};

// From one received row to the next, where an element has `element_bytes`.
constexpr std::uint64_t ReceiveRowStride(std::int64_t hidden, std::uint64_t element_bytes) {
  return AlignUp(static_cast<std::uint64_t>(hidden) * element_bytes, kRegionAlignment);
}

// REQUIRES: a valid config, whose limits keep every product far below 2^63.
constexpr HeapLayout MakeHeapLayout(int num_ranks, std::int64_t max_batch_tokens,
                                    std::int64_t hidden, int max_topk, int num_slots,
                                    std::int64_t num_experts) {
  const auto ranks = static_cast<std::uint64_t>(num_ranks);
  const auto rows = static_cast<std::uint64_t>(max_batch_tokens);
  const auto topk = static_cast<std::uint64_t>(max_topk);
  HeapLayout layout;
  layout.partials_ready_offset = layout.arrivals_offset + ranks * sizeof(Arrival);
  layout.counts_offset = layout.partials_ready_offset + sizeof(SharedFlag);
  layout.count_record_bytes =
      AlignUp(sizeof(CountRecord) +
                  (ranks + static_cast<std::uint64_t>(num_experts)) * sizeof(std::int32_t),
              kRegionAlignment);
  layout.receive_rows_offset = layout.counts_offset + ranks * layout.count_record_bytes;
  layout.local_experts_offset =
      layout.receive_rows_offset + rows * ReceiveRowStride(hidden, sizeof(float));
  layout.weights_offset =
      layout.local_experts_offset + AlignUp(rows * topk * sizeof(std::int32_t), kRegionAlignment);
  layout.partial_rows_offset =
      layout.weights_offset + AlignUp(rows * topk * sizeof(float), kRegionAlignment);
  // Half for two-byte rows, half for sums of half as many rows in fp32; at least one.
  const std::uint64_t half = AlignUp(
      std::max<std::uint64_t>(rows, 2) * static_cast<std::uint64_t>(hidden) * 2, kRegionAlignment);
  layout.sums_offset = layout.partial_rows_offset + half;
  layout.slot_bytes = layout.sums_offset + half;
  layout.heap_bytes = AlignUp(layout.SlotOffset(num_slots), kHeapHeaderBytes);
  return layout;
}

// The table by example: 4 ranks, 6 tokens, H 5, K 3, 2 slots, 10 experts.
inline constexpr HeapLayout kExampleLayout = MakeHeapLayout(4, 6, 5, 3, 2, 10);
static_assert(kExampleLayout.partials_ready_offset == 4 * 128);
static_assert(kExampleLayout.counts_offset == 576);
static_assert(kExampleLayout.count_record_bytes == 128 + 64);
static_assert(kExampleLayout.receive_rows_offset == 576 + 4 * 192);
static_assert(kExampleLayout.local_experts_offset == 1344 + 6 * 64);
static_assert(kExampleLayout.weights_offset == 1728 + 128);
static_assert(kExampleLayout.partial_rows_offset == 1856 + 128);
static_assert(kExampleLayout.sums_offset == 1984 + 64);
static_assert(kExampleLayout.slot_bytes == 1984 + 128);
static_assert(kExampleLayout.heap_bytes == 12288);
static_assert(kHeapHeaderBytes % kRegionAlignment == 0);

// Differs where two ranks' layouts or placements do, so that they refuse each other's heaps.
std::uint64_t LayoutDigest(const ExchangeConfig& config);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_LAYOUT_H_
