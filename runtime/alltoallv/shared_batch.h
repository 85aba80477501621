// Dispatch without a copy: where every rank sees all rows of a batch, with their ids and weights,
// each takes its own from there, and no rank waits for another's, unless the rows were still to
// follow when the batch began.
//
// The rows are taken in the order in which pushed ones would stand, by source rank and token, so
// both ways of dispatch give the same bits. Pure functions; thread safety: none needed.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_SHARED_BATCH_H_
#define EPSERVE_RUNTIME_ALLTOALLV_SHARED_BATCH_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

// A batch of T tokens as every rank sees it. Who wrote it is done with it, or with all but the rows
// that follow; of the rows, those of a rank's shard may be overwritten by that rank once its
// Combine has returned, see HostExchange.
struct SharedBatch {
  // [R + 1], ascending from 0 to T: the shard of rank r is [shard_begin[r], shard_begin[r + 1]).
  // Empty: the batch is not shared.
  std::span<const std::int64_t> shard_begin;
  const void* x = nullptr;                 // [T, H] of the batch's type
  const std::int32_t* topk_ids = nullptr;  // [T, K] global expert id, -1: none
  const float* topk_weights = nullptr;     // [T, K]
  // The rows of each rank's shard are there once that rank calls Dispatch, which tells those that
  // take them. The same on all ranks.
  bool rows_follow = false;

  bool empty() const { return shard_begin.empty(); }
};

// Who takes its rows.
struct SharedBatchReader {
  int rank = 0;
  std::int64_t max_batch_tokens = 0;
  const Placement* placement = nullptr;
  std::span<const std::uint8_t> owner;  // [E] rank that owns the expert
};

// What it takes: N = counts.NumReceived(rank) rows, and of the T tokens of its shard where they go.
// All have place for as many as there can be: `max_batch_tokens`, or the longest shard of that.
struct TakenRows {
  const std::byte** rows = nullptr;             // [N] out, each [H] where it stands in the batch
  std::int32_t* local_experts = nullptr;        // [N, K] out, -1: not here
  float* weights = nullptr;                     // [N, K] out
  std::uint64_t* token_destinations = nullptr;  // [T] out, bit r: goes to rank r
};

// INVALID_ARGUMENT: shards that are no division of a batch, an id outside [-1, E), or counts that
// differ from what the ids give; `out` is undefined then. Reads each id once: they are another
// process's memory. REQUIRES: `counts` valid for the placement.
absl::Status TakeSharedRows(const SharedBatch& batch, const SharedBatchReader& reader,
                            const CountMatrix& counts, int topk, std::uint64_t row_bytes,
                            const TakenRows& out);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_SHARED_BATCH_H_
