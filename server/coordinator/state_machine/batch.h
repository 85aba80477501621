// One batch (or the probe) in flight: what each rank has said of it.
//
// Thread safety: none.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_BATCH_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_BATCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "runtime/routing/count_matrix.h"
#include "server/coordinator/state_machine/events.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

// Who of the R ranks has said something.
class RankSet {
 public:
  explicit RankSet(int num_ranks) : has_(num_ranks, false) {}
  bool Insert(int rank);  // false: was there before
  bool Has(int rank) const { return has_[rank]; }
  bool Full() const { return size_ == static_cast<int>(has_.size()); }

 private:
  std::vector<bool> has_;
  int size_ = 0;
};

// The ranks in the order in which they are to be told to go on: those that only work for others
// first, for whoever has rows waits for them.
std::vector<int> SendingOrder(const std::vector<ShardPlan>& shards);

struct Batch {
  Batch(BatchId id, int slot, int num_ranks, TimeUs now_us);

  BatchId id = 0;
  int slot = 0;
  TimeUs started_us = 0;
  bool probe = false;
  CountExchange exchange = CountExchange::kCoordinator;
  RequestKind kind;                   // of its requests
  std::vector<RequestRows> requests;  // those not ended yet
  std::vector<ShardPlan> shards;      // [R]

  runtime::CountMatrix counts;  // gathered, in CountExchange::kStreams
  RankSet counted;
  RankSet dispatched;
  RankSet done;

  bool failed = false;
  TimeUs failed_until_us = kNever;  // when the others must have answered after the first error
  std::string failure;

  std::vector<StreamId> Streams() const;  // [R] in their SendingOrder
  void DropRequest(RequestId id);

  // The other ranks have no rows to count.
  void ExpectCountsOf(int source);
  // Adds one rank's counts. INVALID_ARGUMENT: they do not fit the placement or the rank's shard,
  // and nothing is taken.
  absl::Status AddCounts(int rank, const Counts& event, const runtime::Placement& placement,
                         int topk);
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_BATCH_H_
