#include "runtime/routing/count_matrix.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {

int Placement::OwnerOf(std::int64_t expert) const {
  // Placements are as good as even, so the guess is right or next to it: no search per id.
  const int ranks = num_ranks();
  int rank = static_cast<int>(expert * ranks / num_experts());
  while (expert < first_expert[rank]) --rank;
  while (expert >= first_expert[rank + 1]) ++rank;
  return rank;
}

Placement EvenPlacement(std::int64_t num_experts, int num_ranks) {
  Placement placement;
  placement.first_expert.reserve(num_ranks + 1);
  for (int rank = 0; rank < num_ranks; ++rank) {
    placement.first_expert.push_back(ShardOf(num_experts, num_ranks, rank).begin);
  }
  placement.first_expert.push_back(num_experts);
  return placement;
}

RowRange ShardOf(std::int64_t num_tokens, int num_ranks, int rank) {
  const std::int64_t base = num_tokens / num_ranks;
  const std::int64_t longer = num_tokens % num_ranks;
  RowRange range;
  range.begin = rank * base + std::min<std::int64_t>(rank, longer);
  range.end = range.begin + base + (rank < longer ? 1 : 0);
  return range;
}

std::int64_t MaxShardTokens(std::int64_t num_tokens, int num_ranks) {
  return (num_tokens + num_ranks - 1) / num_ranks;
}

std::int64_t CountMatrix::ReceiveOffset(int src, int dst) const {
  std::int64_t offset = 0;
  for (int rank = 0; rank < src; ++rank) offset += at(rank, dst);
  return offset;
}

std::int64_t CountMatrix::NumReceived(int dst) const { return ReceiveOffset(num_ranks, dst); }

std::int64_t CountMatrix::SendOffset(int src, int dst) const {
  std::int64_t offset = 0;
  for (int rank = 0; rank < dst; ++rank) offset += at(src, rank);
  return offset;
}

std::int64_t CountMatrix::NumSent(int src) const { return SendOffset(src, num_ranks); }

void CountShard(std::span<const std::int32_t> topk_ids, int topk, const Placement& placement,
                std::span<std::int32_t> rows_to_rank, std::span<std::int64_t> rows_per_expert) {
  for (std::size_t row = 0; row + topk <= topk_ids.size(); row += topk) {
    std::uint64_t ranks = 0;
    for (int k = 0; k < topk; ++k) {
      const std::int32_t expert = topk_ids[row + k];
      if (expert < 0) continue;
      ++rows_per_expert[expert];
      const int owner = placement.OwnerOf(expert);
      const std::uint64_t bit = std::uint64_t{1} << owner;
      if ((ranks & bit) == 0) ++rows_to_rank[owner];
      ranks |= bit;
    }
  }
}

CountMatrix ComputeCountMatrix(std::span<const std::int32_t> topk_ids,
                               std::span<const RowRange> shards, int topk,
                               const Placement& placement) {
  CountMatrix counts;
  const int ranks = placement.num_ranks();
  counts.num_ranks = ranks;
  counts.rows.assign(static_cast<std::size_t>(ranks) * ranks, 0);
  counts.rows_per_expert.assign(placement.num_experts(), 0);
  for (int src = 0; src < ranks; ++src) {
    const RowRange& shard = shards[static_cast<std::size_t>(src)];
    CountShard(topk_ids.subspan(shard.begin * topk, shard.size() * topk), topk, placement,
               std::span(counts.rows).subspan(static_cast<std::size_t>(src) * ranks, ranks),
               counts.rows_per_expert);
  }
  return counts;
}

CountMatrix ComputeCountMatrix(std::span<const std::int32_t> topk_ids, std::int64_t num_tokens,
                               int topk, const Placement& placement) {
  std::vector<RowRange> shards;
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    shards.push_back(ShardOf(num_tokens, placement.num_ranks(), rank));
  }
  return ComputeCountMatrix(topk_ids, shards, topk, placement);
}

int RankOfMostExperts(std::span<const std::int32_t> topk_ids, const Placement& placement) {
  std::array<int, kMaxRanks> owned{};
  for (const std::int32_t expert : topk_ids) {
    if (expert >= 0) ++owned[static_cast<std::size_t>(placement.OwnerOf(expert))];
  }
  return static_cast<int>(std::max_element(owned.begin(), owned.end()) - owned.begin());
}

absl::Status ValidateCountMatrix(const CountMatrix& counts, const Placement& placement,
                                 std::int64_t max_batch_tokens) {
  const int ranks = placement.num_ranks();
  const auto refuse = [](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("count matrix: ", parts...));
  };
  if (counts.num_ranks != ranks) {
    return refuse("num_ranks ", counts.num_ranks, " is not the placement's ", ranks);
  }
  if (counts.rows.size() != static_cast<std::size_t>(ranks) * ranks) {
    return refuse("rows has ", counts.rows.size(), " entries, not the ", ranks * ranks, " of ",
                  ranks, " ranks");
  }
  if (counts.rows_per_expert.size() != static_cast<std::size_t>(placement.num_experts())) {
    return refuse("rows_per_expert has ", counts.rows_per_expert.size(), " entries, not the ",
                  placement.num_experts(), " experts'");
  }
  const std::int64_t max_shard_tokens = MaxShardTokens(max_batch_tokens, ranks);
  for (int dst = 0; dst < ranks; ++dst) {
    for (int src = 0; src < ranks; ++src) {
      const std::int32_t rows = counts.at(src, dst);
      if (rows < 0 || rows > max_shard_tokens) {
        return refuse("rows[", src, "][", dst, "] ", rows, " is outside [0, ", max_shard_tokens,
                      "], a rank's share of max_batch_tokens ", max_batch_tokens);
      }
      if (rows > 0 && placement.num_local_experts(dst) == 0) {
        return refuse("rows[", src, "][", dst, "] ", rows, " goes to a rank that owns no expert");
      }
    }
    if (counts.NumReceived(dst) > max_batch_tokens) {
      return refuse("rank ", dst, " receives ", counts.NumReceived(dst),
                    " rows, which exceeds max_batch_tokens ", max_batch_tokens);
    }
  }
  for (std::size_t expert = 0; expert < counts.rows_per_expert.size(); ++expert) {
    if (counts.rows_per_expert[expert] < 0) {
      return refuse("rows_per_expert[", expert, "] ", counts.rows_per_expert[expert],
                    " is negative");
    }
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
