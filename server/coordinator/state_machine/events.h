// What may happen to the coordinator. Payloads (tensors, probe outputs, times) never enter the
// state machine: the host keeps them by request, or by epoch and batch.
//
// An event that names an unknown stream, an old epoch, an unknown batch, or that repeats what was
// said before changes nothing and is counted in Snapshot::stale_messages.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_EVENTS_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_EVENTS_H_

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

// ---- from a worker's stream, in the order of the stream

// The first message of a stream. The host has checked version, model, limits and cluster id before.
// A worker says Hello only when it touches no peer's memory any more. If a stream of the same
// worker_id is open, that one is closed and replaced.
struct WorkerHello {
  StreamId stream = 0;
  std::string worker_id;
  std::string incarnation;     // new with each process
  EpochId last_epoch = 0;      // highest epoch this process took part in, 0: none
  int held_rank = -1;          // whose weights are in memory, -1: none
  int held_num_ranks = 0;      // the R of that placement
  std::string backend;         // what computes and moves its rows; all workers have one
  bool device_counts = false;  // offers CountExchange::kDevice
};

struct WorkerLoadProgress {
  StreamId stream = 0;
  std::uint64_t loaded_bytes = 0;
  std::uint64_t total_bytes = 0;
};

struct WorkerLoaded {
  StreamId stream = 0;
  int rank = 0;
  int num_ranks = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t heap_bytes = 0;
};

struct HeapCreated {
  StreamId stream = 0;
  EpochId epoch = 0;
  std::string handle;  // opaque, a few bytes
};

// The host keeps the probe output that came with it, by epoch and rank.
struct PeersOpened {
  StreamId stream = 0;
  EpochId epoch = 0;
};

// The worker left the epoch and touches no peer. Unasked for, it ends the epoch for all.
struct EpochQuiesced {
  StreamId stream = 0;
  EpochId epoch = 0;
};

// Keeps the worker alive here. Answered by GrantLease if `epoch` is one that the worker is a live
// member of; else it gets no lease. A worker sends one at once when it is told CreateHeap, so that
// it holds a lease by the time of the first batch.
struct Heartbeat {
  StreamId stream = 0;
  EpochId epoch = 0;
  std::int64_t sent_us = 0;  // the worker's clock; comes back in GrantLease
  std::uint64_t resident_bytes = 0;
};

// Counts of a shard (batches of CountExchange::kStreams).
struct Counts {
  StreamId stream = 0;
  EpochId epoch = 0;
  BatchId batch = 0;
  std::vector<std::int32_t> rows_to_rank;     // [R]
  std::vector<std::int64_t> rows_per_expert;  // [E]
};

struct PhaseDone {
  StreamId stream = 0;
  EpochId epoch = 0;
  BatchId batch = 0;
  Phase phase = Phase::kDispatch;
};

// The host keeps the output rows, by epoch, batch and rank, BEFORE it applies this. It must ignore
// those of a batch that it does not know any more.
struct BatchDone {
  StreamId stream = 0;
  EpochId epoch = 0;
  BatchId batch = 0;
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string message;
};

// The worker asks to leave. It goes on working until it gets Shutdown: accepted requests finish
// first, as with DrainWorker.
struct WorkerLeaving {
  StreamId stream = 0;
  std::string reason;
};

// The worker cannot load, create its heap, or open its peers. Its stream is closed and its rank
// given to another; it may come back with a new Hello.
struct WorkerFailure {
  StreamId stream = 0;
  absl::StatusCode code = absl::StatusCode::kInternal;
  std::string message;
};

// Also for streams that CloseStream or RejectWorker asked to close; then it changes nothing.
struct StreamClosed {
  StreamId stream = 0;
};

// ---- from the coordinator's own machine

// The process of that incarnation has ended and touches nothing any more; its lease need not be
// waited for. May come before or after the end of its stream, which tells what it said last.
struct ProcessEnded {
  std::string worker_id;
  std::string incarnation;
};

// ---- from the front door and the operator

// A validated request. num_tokens = 0 needs no worker: it is completed OK at once while serving.
struct RequestArrived {
  RequestId request = 0;
  CallerId caller = 0;     // whose turns it takes
  std::int64_t layer = 0;  // the model's layer number, known to exist
  RowType row_type = RowType::kFp32;
  bool routed = true;       // ids and weights are given
  bool ids_hidden = false;  // given, but where only the workers can read them
  std::int64_t num_tokens = 0;
  // Of few tokens whose ids are seen: the rank that owns most of their experts; -1: not known.
  int rank_of_most_experts = -1;
  TimeUs deadline_us = kNever;
};

// Requests of one kind may share a batch.
struct RequestKind {
  std::int64_t layer = 0;
  RowType row_type = RowType::kFp32;
  bool routed = true;
  bool ids_hidden = false;

  friend bool operator==(const RequestKind&, const RequestKind&) = default;
};

inline RequestKind KindOf(const RequestArrived& request) {
  return {request.layer, request.row_type, request.routed, request.ids_hidden};
}

// The caller went away or cancelled. Unknown or ended: nothing.
struct RequestCancelled {
  RequestId request = 0;
};

// Whatever had come for the host is taken in: what is queued now has all the company that it gets
// without waiting. Wanted where StateMachine::WantsInputTaken() says so, else nothing.
struct InputTaken {};

// The answer to VerifyProbe.
struct ProbeVerified {
  EpochId epoch = 0;
  bool ok = false;
  std::string message;  // what differed, where not ok
};

// Lets accepted requests finish, then sends the worker away; answered by one DrainWorkerDone with
// this token when its stream has closed.
struct DrainWorker {
  std::string worker_id;
  std::uint64_t token = 0;
};

// Not ready from now on; accepted requests finish, bounded by Config::drain_timeout_us. Answered by
// one ClusterDrained.
struct DrainCluster {};

// From now on no batch but a probe starts until ReleaseBatches; requests wait. Answered by one
// BatchesHeld once none is in flight. The hold ends by itself at `until_us`, or `most_held_us`
// after that answer where this is sooner, and is made anew by another.
struct HoldBatches {
  TimeUs until_us = 0;
  TimeUs most_held_us = kNever;
};
struct ReleaseBatches {};

// Time has passed. Whoever is given up because of silence is given up here, and not in other
// events: so a host that was stalled lets the waiting heartbeats in first and ticks afterwards. A
// Tick that comes much too late counts as a stall of the host, and every worker gets a quarter of a
// lease more.
struct Tick {};

using Event = std::variant<WorkerHello, WorkerLoadProgress, WorkerLoaded, HeapCreated, PeersOpened,
                           EpochQuiesced, Heartbeat, Counts, PhaseDone, BatchDone, WorkerLeaving,
                           WorkerFailure, StreamClosed, ProcessEnded, RequestArrived,
                           RequestCancelled, InputTaken, ProbeVerified, DrainWorker, DrainCluster,
                           HoldBatches, ReleaseBatches, Tick>;

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_EVENTS_H_
