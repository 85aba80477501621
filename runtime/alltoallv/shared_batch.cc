#include "runtime/alltoallv/shared_batch.h"

#include <algorithm>
#include <array>
#include <bit>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

template <typename... Parts>
absl::Status RefuseShared(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("dispatch: ", parts...));
}

absl::Status ValidateShards(const SharedBatch& batch, const SharedBatchReader& reader) {
  const std::span<const std::int64_t> begin = batch.shard_begin;
  const int num_ranks = reader.placement->num_ranks();
  if (begin.size() != static_cast<std::size_t>(num_ranks) + 1) {
    return RefuseShared("shard_begin has ", begin.size(), " entries, not the ", num_ranks + 1,
                        " of ", num_ranks, " shards");
  }
  if (begin.front() != 0 || !std::is_sorted(begin.begin(), begin.end()) ||
      begin.back() > reader.max_batch_tokens) {
    return RefuseShared("shard_begin from ", begin.front(), " to ", begin.back(),
                        " is not ascending from 0 to at most max_batch_tokens ",
                        reader.max_batch_tokens);
  }
  const std::int64_t max_tokens = MaxShardTokens(reader.max_batch_tokens, num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) {
    const std::int64_t num_tokens = begin[rank + 1] - begin[rank];
    if (num_tokens <= max_tokens) continue;
    return RefuseShared("the shard of rank ", rank, " has ", num_tokens, " tokens, which exceeds ",
                        max_tokens, ", a rank's share of max_batch_tokens ",
                        reader.max_batch_tokens);
  }
  if (begin.back() > 0 &&
      (batch.x == nullptr || batch.topk_ids == nullptr || batch.topk_weights == nullptr)) {
    return RefuseShared("x, topk_ids or topk_weights of a shared batch of ", begin.back(),
                        " tokens is null");
  }
  return absl::OkStatus();
}

absl::Status CheckCounted(const CountMatrix& counts, int src, int dst, std::int32_t counted) {
  if (counts.at(src, dst) == counted) return absl::OkStatus();
  return RefuseShared("counts has ", counts.at(src, dst), " rows from rank ", src, " to rank ", dst,
                      ", but topk_ids give ", counted);
}

}  // namespace

absl::Status TakeSharedRows(const SharedBatch& batch, const SharedBatchReader& reader,
                            const CountMatrix& counts, int topk, std::uint64_t row_bytes,
                            const TakenRows& out) {
  EPS_RETURN_IF_ERROR(ValidateShards(batch, reader));
  const int num_ranks = reader.placement->num_ranks();
  const auto num_experts = static_cast<std::uint32_t>(reader.owner.size());
  const auto first = static_cast<std::int32_t>(reader.placement->first_expert[reader.rank]);
  const std::int64_t own_begin = batch.shard_begin[reader.rank];
  std::array<std::int32_t, kMaxRanks> sent{};  // By destination, of the own shard.
  std::int64_t taken = 0;
  for (int src = 0; src < num_ranks; ++src) {
    const std::int64_t taken_before = taken;
    for (std::int64_t t = batch.shard_begin[src]; t < batch.shard_begin[src + 1]; ++t) {
      // Copied to the next row's place first, and left there if it is one: what is checked is then
      // what is used. There is place: fewer than T rows were taken.
      std::int32_t* const experts = out.local_experts + taken * topk;
      std::copy_n(batch.topk_ids + t * topk, topk, experts);
      std::uint64_t destinations = 0;
      for (int k = 0; k < topk; ++k) {
        if (experts[k] == -1) continue;
        if (static_cast<std::uint32_t>(experts[k]) >= num_experts) {  // Negatives are huge here.
          return RefuseShared("topk_ids[", t, "][", k, "] ", experts[k], " is outside [-1, ",
                              num_experts, ")");
        }
        destinations |= std::uint64_t{1} << reader.owner[experts[k]];
      }
      if (src == reader.rank) {
        out.token_destinations[t - own_begin] = destinations;
        for (std::uint64_t left = destinations; left != 0; left &= left - 1) {
          ++sent[std::countr_zero(left)];
        }
      }
      if ((destinations >> reader.rank & 1) == 0) continue;
      for (int k = 0; k < topk; ++k) {
        const bool here = experts[k] >= 0 && reader.owner[experts[k]] == reader.rank;
        out.weights[taken * topk + k] = here ? batch.topk_weights[t * topk + k] : 0.0f;
        experts[k] = here ? experts[k] - first : -1;
      }
      out.rows[taken++] = static_cast<const std::byte*>(batch.x) + t * row_bytes;
    }
    EPS_RETURN_IF_ERROR(
        CheckCounted(counts, src, reader.rank, static_cast<std::int32_t>(taken - taken_before)));
  }
  for (int dst = 0; dst < num_ranks; ++dst) {
    EPS_RETURN_IF_ERROR(CheckCounted(counts, reader.rank, dst, sent[dst]));
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
