#include "runtime/alltoallv/shard_counts.h"

#include <cstddef>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

template <typename... Parts>
absl::Status Refuse(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("counts: ", parts...));
}

}  // namespace

absl::Status ValidateCountsSlot(const ExchangeConfig& config, int slot) {
  if (slot >= 0 && slot < config.num_slots) return absl::OkStatus();
  return Refuse("slot ", slot, " is outside [0, ", config.num_slots, ")");
}

absl::Status ValidateShardCounts(const ExchangeConfig& config, int slot, std::uint64_t sequence,
                                 std::uint64_t last, const ShardCounts& counts) {
  if (sequence <= last) {
    return Refuse("sequence ", sequence, " does not exceed ", last, ", the last one of slot ",
                  slot);
  }
  const auto num_experts = static_cast<std::size_t>(config.placement.num_experts());
  if (counts.rows_to_rank.size() != static_cast<std::size_t>(config.num_ranks) ||
      counts.rows_per_expert.size() != num_experts) {
    return Refuse(counts.rows_to_rank.size(), " ranks and ", counts.rows_per_expert.size(),
                  " experts are not the ", config.num_ranks, " and ", num_experts,
                  " of this epoch");
  }
  const std::int64_t max_tokens = MaxShardTokens(config.max_batch_tokens, config.num_ranks);
  for (std::size_t rank = 0; rank < counts.rows_to_rank.size(); ++rank) {
    const std::int32_t rows = counts.rows_to_rank[rank];
    if (rows >= 0 && rows <= max_tokens) continue;
    return Refuse("rows_to_rank[", rank, "] ", rows, " is outside [0, ", max_tokens,
                  "], a rank's share of max_batch_tokens ", config.max_batch_tokens);
  }
  const std::int64_t max_pairs = max_tokens * config.max_topk;
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    const std::int64_t pairs = counts.rows_per_expert[expert];
    if (pairs >= 0 && pairs <= max_pairs) continue;
    return Refuse("rows_per_expert[", expert, "] ", pairs, " is outside [0, ", max_pairs, "]");
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
