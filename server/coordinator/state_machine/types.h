// Words that events, commands and the state machine share.
//
// A worker, as the coordinator sees it (one control stream is one life of it here):
//
//   Hello ─► standby ─► loading ─► loaded ─► forming ─► serving ─► quiescing ─► loaded ─► ...
//     │         ▲ (every rank taken)           (an epoch it is a member of)
//     └─────────┘
//   any of them ─► draining (asked to leave) ─► leaving (Shutdown sent) ─► gone
//   any of them ─► gone (stream closed, heartbeat late, failure, replaced by a newer stream)
//
// The cluster:
//
//   waiting ─► creating heaps ─► opening peers ─► probing ─► serving
//      ▲             │                │              │          │
//      └─────────────┴────────────────┴──────────────┴──────────┘  a member lost, failed or
//      drained,
//                                                                   a timeout, a wrong probe
//
// waiting ─► creating heaps needs all of: every rank loaded; no live worker still quiescing; the
// lease of every lost worker run out, or that same process back; on a fresh start one lease passed,
// or every rank's holder of one and the same last epoch back; the backoff after a failure passed.
//
// A batch: started ─► [counts from all R ─► matrix to all] ─► [dispatch trigger ─► PhaseDone from
// all R ─► combine trigger] ─► BatchDone from all R ─► finished, and its slot is free again. An
// error in a BatchDone fails its requests at once; the slot stays taken until all R have answered.
// Counts come from the workers in CountExchange::kStreams alone; where a single rank has all rows,
// from that one.
//
// A request ends exactly once: by CompleteRequest or by standing in FinishBatch.requests.
//
// Times are microseconds on the host's monotonic clock.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_TYPES_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_TYPES_H_

#include <cstdint>
#include <limits>

#include "runtime/routing/count_matrix.h"

namespace epserve::coordinator {

using StreamId = std::uint64_t;   // one control stream; never reused by the host
using RequestId = std::uint64_t;  // one inference request; never reused by the host
using EpochId = std::uint64_t;    // 0: none
using BatchId = std::uint64_t;    // counts up from 1 in each epoch; the probe is batch 1
// Whoever is to get a fair share of the queue: one connection of the front door.
using CallerId = std::uint64_t;
using TimeUs = std::int64_t;  // monotonic

inline constexpr TimeUs kNever = std::numeric_limits<TimeUs>::max();

enum class RowType { kFp32, kFp16, kBf16 };
enum class Phase { kDispatch, kCombine };

enum class TriggerMode {
  kTogether,  // Dispatch and combine ride on the shard.
  kSeparate,  // The worker waits for a trigger before each.
};

// How a batch's count matrix is made.
enum class CountExchange {
  kCoordinator,  // It computes the matrix from the ids and sends it with the shards.
  kStreams,      // It gathers the workers' counts and sends them the matrix.
  kDevice,       // The workers exchange the counts among themselves.
};
inline constexpr int kNumCountExchanges = 3;
// As traces and metrics have it.
constexpr const char* CountExchangeName(CountExchange exchange) {
  constexpr const char* kNames[kNumCountExchanges] = {"coordinator", "streams", "device"};
  return kNames[static_cast<int>(exchange)];
}

// Which of them batches take.
enum class CountExchangeMode {
  // As kCoordinator, but kDevice instead of kStreams where all workers offer it and several ranks
  // have rows.
  kAuto,
  kCoordinator,  // kCoordinator where it sees the ids, else kStreams
  kDevice,       // kDevice; a worker that does not offer it may not join
};

enum class WorkerState { kStandby, kLoading, kLoaded, kForming, kServing, kQuiescing, kLeaving };
inline constexpr int kNumWorkerStates = 7;
enum class ClusterState { kWaiting, kForming, kProbing, kServing, kDraining };

// One rank's part of a batch.
struct ShardPlan {
  int rank = 0;
  StreamId stream = 0;
  runtime::RowRange rows;  // of the batch; may be empty
};

// One request's place in a batch.
struct RequestRows {
  RequestId request = 0;
  runtime::RowRange rows;  // of the batch; never empty
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_TYPES_H_
