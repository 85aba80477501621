// Who sends how many rows to whom in one batch: what every rank needs to know before any row moves.
//
// A token goes ONCE to each rank that owns any of its experts, however many of them that rank owns.
// The coordinator computes the matrix where it sees the ids; elsewhere each rank counts its own
// shard, and the counts are gathered by the coordinator or exchanged by the ranks. All ways give
// the same matrix. Pure functions, safe from any thread.
#ifndef EPSERVE_RUNTIME_ROUTING_COUNT_MATRIX_H_
#define EPSERVE_RUNTIME_ROUTING_COUNT_MATRIX_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"

namespace epserve::runtime {

// Ranks of one epoch at most: a token's destinations fit one 64-bit mask.
inline constexpr int kMaxRanks = 64;

// Experts to ranks: rank r owns the global experts [first[r], first[r + 1]) of every layer.
struct Placement {
  std::vector<std::int64_t> first_expert;  // [R + 1], ascending, first 0, last E

  int num_ranks() const { return static_cast<int>(first_expert.size()) - 1; }
  std::int64_t num_experts() const { return first_expert.empty() ? 0 : first_expert.back(); }
  std::int64_t num_local_experts(int rank) const {
    return first_expert[rank + 1] - first_expert[rank];
  }
  int OwnerOf(std::int64_t expert) const;  // REQUIRES: 0 <= expert < E
};

// Contiguous and as even as can be: the first E mod R ranks own one more. Ranks may own none.
Placement EvenPlacement(std::int64_t num_experts, int num_ranks);

// Splits T rows into R contiguous shards, the first T mod R one longer. Shards may be empty.
struct RowRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return end - begin; }
};
RowRange ShardOf(std::int64_t num_tokens, int num_ranks, int rank);
// The longest shard that ShardOf gives for up to `num_tokens`: ceil(T / R).
std::int64_t MaxShardTokens(std::int64_t num_tokens, int num_ranks);

struct CountMatrix {
  int num_ranks = 0;
  std::vector<std::int32_t> rows;             // [R, R] rows[src * R + dst]
  std::vector<std::int64_t> rows_per_expert;  // [E] token-expert pairs, over all shards

  std::int32_t at(int src, int dst) const { return rows[src * num_ranks + dst]; }
  // Where src's rows begin among the rows dst receives (ordered by source rank).
  std::int64_t ReceiveOffset(int src, int dst) const;
  std::int64_t NumReceived(int dst) const;
  // Where dst's rows begin among the rows that src sent (ordered by destination rank).
  std::int64_t SendOffset(int src, int dst) const;
  std::int64_t NumSent(int src) const;
};

// What one rank adds to the matrix.
struct ShardCounts {
  std::vector<std::int32_t> rows_to_rank;     // [R] its row of the matrix
  std::vector<std::int64_t> rows_per_expert;  // [E] token-expert pairs of its shard
};

// Counts one shard. An id of -1 is no expert; an id that stands twice in a row counts twice in
// rows_per_expert and once in rows_to_rank.
// REQUIRES: ids validated, in [-1, E); R <= kMaxRanks; rows_to_rank has R, rows_per_expert E
// entries. Adds to both.
void CountShard(std::span<const std::int32_t> topk_ids, int topk, const Placement& placement,
                std::span<std::int32_t> rows_to_rank, std::span<std::int64_t> rows_per_expert);

// The whole matrix for topk_ids [T, K], `shards` [R] by rank, one after another from 0 to T.
CountMatrix ComputeCountMatrix(std::span<const std::int32_t> topk_ids,
                               std::span<const RowRange> shards, int topk,
                               const Placement& placement);
// The same, sharded by ShardOf.
CountMatrix ComputeCountMatrix(std::span<const std::int32_t> topk_ids, std::int64_t num_tokens,
                               int topk, const Placement& placement);

// The rank that owns most of a token's experts, the lowest of several; 0 where it names none.
// REQUIRES: ids validated, in [-1, E).
int RankOfMostExperts(std::span<const std::int32_t> topk_ids, const Placement& placement);

// Refuses a matrix that does not fit: wrong sizes, negative counts, rows to a rank without experts,
// more rows from a source than the longest shard of `max_batch_tokens`, or more rows to a rank than
// `max_batch_tokens`. INVALID_ARGUMENT names the entry.
absl::Status ValidateCountMatrix(const CountMatrix& counts, const Placement& placement,
                                 std::int64_t max_batch_tokens);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ROUTING_COUNT_MATRIX_H_
