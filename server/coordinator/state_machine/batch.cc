#include "server/coordinator/state_machine/batch.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {

bool RankSet::Insert(int rank) {
  if (has_[rank]) return false;
  has_[rank] = true;
  ++size_;
  return true;
}

std::vector<int> SendingOrder(const std::vector<ShardPlan>& shards) {
  std::vector<int> order;
  order.reserve(shards.size());
  for (const bool has_rows : {false, true}) {
    for (const ShardPlan& shard : shards) {
      if ((shard.rows.size() > 0) == has_rows) order.push_back(shard.rank);
    }
  }
  return order;
}

Batch::Batch(BatchId id, int slot, int num_ranks, TimeUs now_us)
    : id(id),
      slot(slot),
      started_us(now_us),
      counted(num_ranks),
      dispatched(num_ranks),
      done(num_ranks) {}

std::vector<StreamId> Batch::Streams() const {
  std::vector<StreamId> streams;
  streams.reserve(shards.size());
  for (const int rank : SendingOrder(shards)) streams.push_back(shards[rank].stream);
  return streams;
}

void Batch::DropRequest(RequestId id) {
  std::erase_if(requests, [&](const RequestRows& rows) { return rows.request == id; });
}

void Batch::ExpectCountsOf(int source) {
  for (const ShardPlan& shard : shards) {
    if (shard.rank != source) counted.Insert(shard.rank);
  }
}

absl::Status Batch::AddCounts(int rank, const Counts& event, const runtime::Placement& placement,
                              int topk) {
  const std::size_t num_ranks = shards.size();
  const std::size_t num_experts = static_cast<std::size_t>(placement.num_experts());
  if (event.rows_to_rank.size() != num_ranks || event.rows_per_expert.size() != num_experts) {
    return absl::InvalidArgumentError(absl::StrCat(
        "counts: ", event.rows_to_rank.size(), " ranks and ", event.rows_per_expert.size(),
        " experts differ from ", num_ranks, " and ", num_experts, "; see the worker's version"));
  }
  const std::int64_t num_tokens = shards[rank].rows.size();
  for (std::size_t dst = 0; dst < num_ranks; ++dst) {
    if (event.rows_to_rank[dst] < 0 || event.rows_to_rank[dst] > num_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("counts: rows_to_rank[", dst, "] ",
                                                     event.rows_to_rank[dst], " outside [0, ",
                                                     num_tokens, "]; see the worker's log"));
    }
  }
  const std::int64_t most_rows = num_tokens * topk;
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    if (event.rows_per_expert[expert] < 0 || event.rows_per_expert[expert] > most_rows) {
      return absl::InvalidArgumentError(absl::StrCat("counts: rows_per_expert[", expert, "] ",
                                                     event.rows_per_expert[expert], " outside [0, ",
                                                     most_rows, "]; see the worker's log"));
    }
  }
  if (counts.num_ranks == 0) {
    counts.num_ranks = static_cast<int>(num_ranks);
    counts.rows.resize(num_ranks * num_ranks);
    counts.rows_per_expert.resize(num_experts);
  }
  std::copy(event.rows_to_rank.begin(), event.rows_to_rank.end(),
            counts.rows.begin() + rank * static_cast<std::ptrdiff_t>(num_ranks));
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    counts.rows_per_expert[expert] += event.rows_per_expert[expert];
  }
  return absl::OkStatus();
}

}  // namespace epserve::coordinator
