// What the state machine is told at start, and what it shows of itself.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_CONFIG_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_CONFIG_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/routing/count_matrix.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

struct Config {
  // The placement is EvenPlacement(num_experts, num_workers).
  int num_workers = 1;               // R
  std::int64_t num_experts = 1;      // E
  int topk = 1;                      // K
  std::vector<std::int64_t> layers;  // model layer numbers, ascending; the probe takes the first
  std::int64_t max_batch_tokens = 4096;
  // On CPUs all rows of a batch of up to so many tokens are one rank's: no more than a shard of a
  // full batch has.
  std::int64_t single_source_tokens = 1;
  int num_slots = 2;
  std::int64_t queue_capacity = 1024;  // requests not yet in a batch
  // Requests that wait in the queue when a batch starts share it where they can.
  bool merge_queued = false;
  // Whoever takes in requests applies InputTaken, where it is wanted, before it waits for more.
  bool input_is_told = false;
  std::int64_t batch_window_us = 0;  // how long one waits for others to come; above 0: merges, too
  TriggerMode trigger = TriggerMode::kTogether;
  CountExchangeMode count_exchange = CountExchangeMode::kAuto;

  std::int64_t lease_us = 1'000'000;
  // Workers write to memory that is no epoch's own and outlives the coordinator: clients' regions.
  bool client_regions = false;
  EpochId initial_epoch = 1;  // unix seconds at start
  TimeUs start_us = 0;        // monotonic time at start
  // The n-th epoch of this coordinator starts no earlier than n times this after the start, so that
  // epoch numbers do not run ahead of the unix seconds that they began from, and a flapping worker
  // does not keep the cluster forming. 0: no such limit.
  std::int64_t epoch_pace_us = 1'000'000;
  // After a failed probe or formation; doubles with each in a row, up to 16 times.
  std::int64_t probe_backoff_us = 1'000'000;
  std::int64_t formation_timeout_us = 30'000'000;  // each step of forming; quiescing
  std::int64_t batch_timeout_us = 60'000'000;
  std::int64_t drain_timeout_us = 10'000'000;
};

struct WorkerSnapshot {
  StreamId stream = 0;
  std::string worker_id;
  std::string incarnation;
  int rank = -1;  // -1: none
  WorkerState state = WorkerState::kStandby;
  bool draining = false;
  std::int64_t first_expert = 0;
  std::int64_t num_experts = 0;
  std::uint64_t loaded_bytes = 0;
  std::uint64_t total_bytes = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t heap_bytes = 0;
  std::uint64_t resident_bytes = 0;
  std::uint64_t batches = 0;  // done in the present epoch, without the probe
  TimeUs last_heartbeat_us = 0;
};

// What of a snapshot is shown after every event, and so has to be cheap.
struct Load {
  EpochId epoch = 0;
  std::int64_t queued_requests = 0;
  std::int64_t batches_in_flight = 0;
  std::array<int, kNumWorkerStates> workers{};  // by WorkerState, but for those that drain
  int workers_draining = 0;
};

struct Snapshot {
  ClusterState state = ClusterState::kWaiting;
  bool serving = false;                 // new requests are accepted
  EpochId epoch = 0;                    // the present epoch, or the last one
  std::string waiting_for;              // why no epoch starts, for people; empty unless waiting
  std::string last_epoch_end;           // why the last one ended; empty unless none serves since
  std::vector<WorkerSnapshot> workers;  // by rank, then standbys in the order they joined
  int expected_workers = 0;
  std::int64_t num_experts = 0;
  std::int64_t experts_without_worker = 0;
  std::int64_t queued_requests = 0;
  std::int64_t queue_capacity = 0;
  std::int64_t requests_in_flight = 0;  // in a batch and not ended
  std::int64_t batches_in_flight = 0;   // slots taken, the probe's too
  std::uint64_t requests_ok = 0;        // of those that came to the machine, as the next
  std::uint64_t requests_failed = 0;
  std::uint64_t stale_messages = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_CONFIG_H_
