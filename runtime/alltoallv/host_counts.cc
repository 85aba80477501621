#include "runtime/alltoallv/host_counts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "runtime/alltoallv/shard_counts.h"
#include "runtime/base/status.h"

namespace epserve::runtime {

void CountRecords::Initialize() const {
  for (int source = 0; source < num_ranks_; ++source) new (&record(source)) CountRecord{};
}

void CountRecords::Publish(int source, std::uint64_t sequence, const ShardCounts& counts) const {
  std::int32_t* out = values(source);
  for (const std::int32_t rows : counts.rows_to_rank) *out++ = rows;
  for (const std::int64_t pairs : counts.rows_per_expert) *out++ = static_cast<std::int32_t>(pairs);
  record(source).sequence = sequence;
  // The counts first; pairs with the peers' wait in ExchangeCounts. See shared_flag.h.
  runtime::Publish(flag(source), sequence);
}

absl::Status CountRecords::AddTo(CountMatrix* matrix, int source, std::uint64_t sequence) const {
  if (record(source).sequence != sequence) {
    return absl::InternalError(absl::StrCat("counts: rank ", source, " told those of batch ",
                                            record(source).sequence, ", expected batch ",
                                            sequence));
  }
  const std::int32_t* in = values(source);
  for (int rank = 0; rank < num_ranks_; ++rank) {
    matrix->rows[static_cast<std::size_t>(source * num_ranks_ + rank)] = *in++;
  }
  for (std::int64_t& pairs : matrix->rows_per_expert) pairs += *in++;
  return absl::OkStatus();
}

void AddCounts(const ShardCounts& counts, int source, CountMatrix* matrix) {
  for (int rank = 0; rank < matrix->num_ranks; ++rank) {
    const auto dst = static_cast<std::size_t>(rank);
    matrix->rows[static_cast<std::size_t>(source * matrix->num_ranks) + dst] =
        counts.rows_to_rank[dst];
  }
  for (std::size_t expert = 0; expert < matrix->rows_per_expert.size(); ++expert) {
    matrix->rows_per_expert[expert] += counts.rows_per_expert[expert];
  }
}

CountRecords HostExchange::RecordsOf(int rank, int slot) const {
  return CountRecords(heaps_[static_cast<std::size_t>(rank)] + layout_.SlotOffset(slot), layout_,
                      config_.num_ranks);
}

absl::Status HostExchange::ValidateCounts(int slot, std::uint64_t sequence,
                                          const ShardCounts& counts) const {
  if (heaps_.empty()) {
    return absl::FailedPreconditionError("counts: peers are not open; call OpenPeers first");
  }
  EPS_RETURN_IF_ERROR(ValidateCountsSlot(config_, slot));
  const Slot& used = slots_[static_cast<std::size_t>(slot)];
  return ValidateShardCounts(config_, slot, sequence,
                             std::max(used.counted_sequence, used.sequence), counts);
}

absl::StatusOr<CountMatrix> HostExchange::ExchangeCounts(int slot, std::uint64_t sequence,
                                                         const ShardCounts& counts) {
  EPS_RETURN_IF_ERROR(ValidateCounts(slot, sequence, counts));
  // Relaxed: the word orders nothing. After an abort not one more byte goes to a peer.
  if (abort_.load(std::memory_order_relaxed) != 0) return Aborted("counts");
  slots_[static_cast<std::size_t>(slot)].counted_sequence = sequence;
  CountMatrix matrix;
  matrix.num_ranks = config_.num_ranks;
  matrix.rows.resize(static_cast<std::size_t>(config_.num_ranks) *
                     static_cast<std::size_t>(config_.num_ranks));
  matrix.rows_per_expert.resize(counts.rows_per_expert.size());
  // The next rank first, so that the ranks' first records go different ways.
  for (int i = 1; i < config_.num_ranks; ++i) {
    RecordsOf((config_.rank + i) % config_.num_ranks, slot).Publish(config_.rank, sequence, counts);
  }
  const CountRecords own = RecordsOf(config_.rank, slot);
  const WaitLimits limits{
      std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(config_.peer_timeout), &abort_,
      absl::ToChronoNanoseconds(config_.busy_poll)};
  for (int source = 0; source < config_.num_ranks; ++source) {
    if (source == config_.rank) {
      AddCounts(counts, source, &matrix);
      continue;
    }
    EPS_RETURN_IF_ERROR(AwaitPeer("counts", slot, sequence, source, own.flag(source), limits));
    EPS_RETURN_IF_ERROR(own.AddTo(&matrix, source, sequence));
  }
  return matrix;
}

}  // namespace epserve::runtime
