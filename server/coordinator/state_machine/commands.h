// What the state machine tells its host to do, in order. Commands carry every field the host needs.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_COMMANDS_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_COMMANDS_H_

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "runtime/routing/count_matrix.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

// ---- to one worker's stream

struct AssignRank {
  StreamId stream = 0;
  int rank = 0;
  runtime::Placement placement;
};

struct SendStandby {
  StreamId stream = 0;
  std::string reason;
};

struct SendCreateHeap {
  StreamId stream = 0;
  EpochId epoch = 0;
};

struct SendOpenPeers {
  StreamId stream = 0;
  EpochId epoch = 0;
  std::vector<std::string> handles;  // [R], by rank
};

struct SendEpochStarted {
  StreamId stream = 0;
  EpochId epoch = 0;
};

// After this no command carries this epoch, or an older one, to this stream.
struct SendEpochEnded {
  StreamId stream = 0;
  EpochId epoch = 0;
  std::string reason;
};

struct GrantLease {
  StreamId stream = 0;
  EpochId epoch = 0;
  std::int64_t echo_us = 0;
  std::int64_t duration_us = 0;
};

// Finish, leave and exit 0.
struct SendShutdown {
  StreamId stream = 0;
  std::string reason;
};

// The worker may not join: send Rejected, then close the stream.
struct RejectWorker {
  StreamId stream = 0;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
  std::string message;
};

// The machine has forgotten this stream; nothing more goes to it.
struct CloseStream {
  StreamId stream = 0;
  std::string reason;
  bool turned_away = false;  // It has not joined.
};

// ---- batches. Each StartProbe and StartBatch is answered by exactly one of VerifyProbe (probe
// only), FinishBatch (batch only) or DropBatch; then the host frees what it kept of the batch.

// The probe of server/common/probe.h, routed, fp32, on the first layer, as batch `batch`. The host
// computes its rows, ids, weights and, for CountExchange::kCoordinator, its count matrix, and sends
// each rank its shard.
struct StartProbe {
  EpochId epoch = 0;
  BatchId batch = 0;
  int slot = 0;
  std::int64_t layer = 0;
  std::int64_t num_tokens = 0;    // max(2R, 2), at most max_batch_tokens
  std::vector<ShardPlan> shards;  // [R], by rank
  TriggerMode trigger = TriggerMode::kTogether;
  CountExchange counts = CountExchange::kCoordinator;  // never kStreams
};

// Send each rank its shard. The batch's rows are the requests' rows one after another. For
// CountExchange::kCoordinator the host computes the count matrix from the ids and sends it with the
// shards. For CountExchange::kStreams the shards of a single source's peers are kept until
// SendCountMatrix, which they then bring along.
struct StartBatch {
  EpochId epoch = 0;
  BatchId batch = 0;
  int slot = 0;
  std::int64_t layer = 0;
  RowType row_type = RowType::kFp32;
  bool routed = true;
  std::int64_t num_tokens = 0;
  std::vector<RequestRows> requests;  // in batch order
  std::vector<ShardPlan> shards;      // [R], by rank
  TriggerMode trigger = TriggerMode::kTogether;
  CountExchange counts = CountExchange::kCoordinator;  // kCoordinator: ids are seen here
  bool single_source = false;                          // One shard has all rows.
};

// The matrix gathered from all ranks' Counts, to all ranks.
struct SendCountMatrix {
  EpochId epoch = 0;
  BatchId batch = 0;
  runtime::CountMatrix counts;
  std::vector<StreamId> streams;  // [R], by rank
};

struct SendDispatchTrigger {
  EpochId epoch = 0;
  BatchId batch = 0;
  std::vector<StreamId> streams;  // [R], by rank
};

struct SendCombineTrigger {
  EpochId epoch = 0;
  BatchId batch = 0;
  std::vector<StreamId> streams;  // [R], by rank
};

// Every rank's rows of the probe are there: hold them against the probe outputs of PeersOpened and
// answer with ProbeVerified. Frees the batch.
struct VerifyProbe {
  EpochId epoch = 0;
  BatchId batch = 0;
};

// Every rank's rows are there: deliver these requests OK, each with its rows of the batch's output.
// Requests that were cancelled or timed out meanwhile are missing. Frees the batch.
struct FinishBatch {
  EpochId epoch = 0;
  BatchId batch = 0;
  std::vector<RequestRows> requests;
};

// The batch came to nothing (its requests have been completed one by one). Frees the batch.
struct DropBatch {
  EpochId epoch = 0;
  BatchId batch = 0;
};

// ---- to the front door and the operator

// Ends the request. OK only for a request of no tokens, whose output is empty.
struct CompleteRequest {
  RequestId request = 0;
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string message;            // never empty where the code is not OK
  std::int64_t pushback_ms = -1;  // grpc-retry-pushback-ms, where >= 0
  EpochId epoch = 0;              // the epoch that answered, 0: none
};

// Readiness changed (health service, ServerReady).
struct SetServing {
  bool serving = false;
  EpochId epoch = 0;  // the epoch that began or ceased to serve
};

// Answers HoldBatches: no batch is in flight, and none starts until ReleaseBatches. Or `expired`:
// the hold has ended by itself, before or after this was said.
struct BatchesHeld {
  bool expired = false;
};

struct DrainWorkerDone {
  std::uint64_t token = 0;
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string message;  // empty where the code is OK
};

// Nothing accepted is left; the host may exit.
struct ClusterDrained {};

struct NoticeField {
  const char* key;  // a literal
  std::variant<std::int64_t, std::uint64_t, std::string> value;
};

// Something an operator wants in the log.
struct Notice {
  enum class Level { kInfo, kWarning, kError };
  Level level = Level::kInfo;
  std::string event;  // one word or two, snake_case: "worker_lost", "epoch_started"
  std::vector<NoticeField> fields;
};

using Command =
    std::variant<AssignRank, SendStandby, SendCreateHeap, SendOpenPeers, SendEpochStarted,
                 SendEpochEnded, GrantLease, SendShutdown, RejectWorker, CloseStream, StartProbe,
                 StartBatch, SendCountMatrix, SendDispatchTrigger, SendCombineTrigger, VerifyProbe,
                 FinishBatch, DropBatch, CompleteRequest, SetServing, BatchesHeld, DrainWorkerDone,
                 ClusterDrained, Notice>;

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_COMMANDS_H_
