// A state machine on a fake clock, with workers played by hand.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_FIXTURE_H_

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/coordinator/state_machine/state_machine.h"

namespace epserve::coordinator {

using Commands = std::vector<Command>;

template <typename T>
std::vector<T> All(const Commands& commands) {
  std::vector<T> found;
  for (const Command& command : commands) {
    if (const T* one = std::get_if<T>(&command)) found.push_back(*one);
  }
  return found;
}

template <typename T>
std::optional<T> First(const Commands& commands) {
  const std::vector<T> all = All<T>(commands);
  if (all.empty()) return std::nullopt;
  return all.front();
}

template <typename T>
bool Has(const Commands& commands) {
  return First<T>(commands).has_value();
}

// Where the first T stands among the commands; -1: nowhere.
template <typename T>
int IndexOf(const Commands& commands) {
  for (std::size_t i = 0; i < commands.size(); ++i) {
    if (std::holds_alternative<T>(commands[i])) return static_cast<int>(i);
  }
  return -1;
}

inline Config TestConfig(int num_workers = 4) {
  Config config;
  config.num_workers = num_workers;
  config.num_experts = 16LL * num_workers;
  config.topk = 2;
  config.layers = {3, 4, 7};
  config.max_batch_tokens = 64;
  config.num_slots = 2;
  config.queue_capacity = 4;
  config.initial_epoch = 1000;
  config.epoch_pace_us = 0;
  return config;
}

class TestCluster {
 public:
  // The clock begins two leases after the coordinator's start unless told otherwise.
  explicit TestCluster(const Config& config = TestConfig(), TimeUs now_us = 2'000'000)
      : config(config), machine(config), now_us(now_us) {}

  Commands Do(const Event& event) { return machine.Apply(event, now_us); }

  // Moves time on, ticking whenever the machine asks for it. No heartbeat is sent.
  Commands Sleep(std::int64_t duration_us) {
    Commands all;
    const TimeUs end_us = now_us + duration_us;
    for (std::optional<TimeUs> due = machine.NextDeadline(); due && *due <= end_us;
         due = machine.NextDeadline()) {
      now_us = std::max(now_us, *due);
      Append(&all, Do(Tick{}));
    }
    now_us = end_us;
    return all;
  }

  // Moves time on with a heartbeat of `streams` (default: all open ones) every quarter of a lease.
  Commands Run(std::int64_t duration_us) { return Run(duration_us, Streams()); }
  Commands Run(std::int64_t duration_us, const std::vector<StreamId>& streams) {
    Commands all;
    const TimeUs end_us = now_us + duration_us;
    while (now_us < end_us) {
      for (const StreamId stream : streams) Append(&all, Do(Heartbeat{stream, epoch, now_us, 0}));
      Append(&all, Sleep(std::min(config.lease_us / 4, end_us - now_us)));
    }
    return all;
  }

  // A new stream says Hello; the worker's incarnation is "<id>#1" unless given.
  Commands Join(const std::string& worker_id, WorkerHello hello = {}) {
    hello.stream = ++last_stream;
    hello.worker_id = worker_id;
    hello.device_counts |= device_counts;
    if (hello.incarnation.empty()) hello.incarnation = worker_id + "#1";
    stream_of[worker_id] = hello.stream;
    return Do(hello);
  }
  StreamId stream(int i) const { return stream_of.at("w" + std::to_string(i)); }
  std::vector<StreamId> Streams() const {
    std::vector<StreamId> streams;
    for (const WorkerSnapshot& worker : machine.TakeSnapshot().workers) {
      streams.push_back(worker.stream);
    }
    return streams;
  }

  Commands Load(int i, int rank) {
    return Do(WorkerLoaded{stream(i), rank, config.num_workers, 1000, 100});
  }
  // w0 to w<R-1> join and load, each rank i.
  Commands JoinAndLoadAll() {
    Commands all;
    for (int i = 0; i < config.num_workers; ++i) Append(&all, Join("w" + std::to_string(i)));
    for (int i = 0; i < config.num_workers; ++i) Append(&all, Load(i, i));
    return all;
  }
  StreamId AtRank(int rank) const { return machine.TakeSnapshot().workers.at(rank).stream; }

  // From CreateHeap to the started probe.
  Commands Form() {
    epoch = machine.TakeSnapshot().epoch;
    Commands all;
    for (int r = 0; r < config.num_workers; ++r) {
      Append(&all, Do(HeapCreated{AtRank(r), epoch, "heap" + std::to_string(r)}));
    }
    for (int r = 0; r < config.num_workers; ++r) Append(&all, Do(PeersOpened{AtRank(r), epoch}));
    return all;
  }
  // That rank i sends so many rows to each rank, all of them to its i-th expert.
  Counts CountsOf(int i, BatchId batch, std::int32_t rows = 1) const {
    Counts counts{stream(i), epoch, batch};
    counts.rows_to_rank.assign(static_cast<std::size_t>(config.num_workers), rows);
    counts.rows_per_expert.assign(static_cast<std::size_t>(config.num_experts), 0);
    counts.rows_per_expert[static_cast<std::size_t>(i)] = rows;
    return counts;
  }
  Commands Finish(BatchId batch) {
    Commands all;
    for (int r = 0; r < config.num_workers; ++r) {
      Append(&all, Do(BatchDone{AtRank(r), epoch, batch}));
    }
    return all;
  }
  Commands Probe() {
    Commands all = Finish(1);
    Append(&all, Do(ProbeVerified{epoch, true, ""}));
    return all;
  }
  // All of the way to serving from loaded.
  Commands FormAndProbe() {
    Commands all = Form();
    Append(&all, Probe());
    return all;
  }
  void Serve() {
    JoinAndLoadAll();
    FormAndProbe();
    ASSERT_EQ(machine.TakeSnapshot().state, ClusterState::kServing);
  }
  void ServeOn(const std::string& backend) {
    for (int i = 0; i < config.num_workers; ++i) {
      Join("w" + std::to_string(i), {.backend = backend});
    }
    for (int i = 0; i < config.num_workers; ++i) Load(i, i);
    FormAndProbe();
    ASSERT_EQ(machine.TakeSnapshot().state, ClusterState::kServing);
  }
  // Everyone still connected answers EpochEnded.
  Commands QuiesceAll() {
    Commands all;
    for (const StreamId stream : Streams()) Append(&all, Do(EpochQuiesced{stream, epoch}));
    return all;
  }

  Commands Request(RequestId id, std::int64_t num_tokens = 8, RequestArrived request = {}) {
    request.request = id;
    request.num_tokens = num_tokens;
    if (request.layer == 0) request.layer = 3;
    return Do(request);
  }

  Snapshot snapshot() const { return machine.TakeSnapshot(); }

  static void Append(Commands* all, Commands more) {
    for (Command& command : more) all->push_back(std::move(command));
  }

  Config config;
  StateMachine machine;
  TimeUs now_us;
  EpochId epoch = 0;
  StreamId last_stream = 100;
  bool device_counts = false;  // offered by whoever joins from now on
  std::map<std::string, StreamId> stream_of;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_FIXTURE_H_
