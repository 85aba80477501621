// Random schedules of joins, losses, pauses, restarts, late and repeated messages, cancellations
// and deadlines, each from its seed; every promise is checked after every step.
//
// EPSERVE_SIM_SCHEDULES: how many schedules (default 10000; 1000 in sanitizer builds).
// EPSERVE_SIM_SEED: run that one schedule and trace it to stderr.
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/server/coordinator/state_machine/simulation/network.h"
#include "tests/server/coordinator/state_machine/simulation/sim_coordinator.h"
#include "tests/server/coordinator/state_machine/simulation/sim_worker.h"
#include "tests/server/coordinator/state_machine/simulation/world.h"

namespace epserve::coordinator::sim {
namespace {

// What all schedules together have seen: a simulation that reaches nothing proves nothing.
struct Totals {
  std::int64_t requests = 0;
  std::int64_t requests_ok = 0;
  std::int64_t epochs = 0;
  std::int64_t coordinator_lives = 0;
  std::int64_t processes = 0;
  std::int64_t stale_messages = 0;
  std::map<CountExchange, std::int64_t> batches;
};

class Schedule {
 public:
  Schedule(std::uint64_t seed, bool trace) : world_(seed, trace), network_(world_) {
    DrawConfig();
    network_.to_coordinator = [this](int life, const Event& event) {
      if (life < static_cast<int>(lives_.size())) return;  // To one that is dead.
      lives_.back()->Deliver(event);
    };
    const int num_workers = config_.num_workers + static_cast<int>(world_.Between(0, 2));
    const bool alike = config_.count_exchange == CountExchangeMode::kDevice || world_.Chance(0.7);
    for (int i = 0; i < num_workers; ++i) {
      workers_.push_back(std::make_unique<SimWorker>(
          world_, network_, exchanges_, config_, i, [this] { return ListeningLife(); },
          /*device_counts=*/alike || world_.Chance(0.5)));
      exchanges_.workers.push_back(workers_.back().get());
    }
  }

  // Empty: every promise was kept.
  std::string Run() {
    StartCoordinator();
    for (auto& worker : workers_) {
      world_.At(world_.now() + world_.Between(0, 100 * kMs), [&] { worker->StartProcess(); });
    }
    NextRequest();
    NextFault();
    world_.RunUntil(world_.now() + world_.Between(200 * kMs, 3000 * kMs));
    world_.faults = false;
    world_.Trace("no more faults");
    ExpectServiceComesBack();
    ExpectDrains();
    return world_.failure();
  }

  void AddTo(Totals* totals) const {
    totals->requests += static_cast<std::int64_t>(world_.requests.size());
    for (const auto& [id, request] : world_.requests) totals->requests_ok += request.ok;
    totals->epochs += static_cast<std::int64_t>(world_.members.size());
    totals->coordinator_lives += static_cast<std::int64_t>(lives_.size());
    totals->processes += world_.next_process - 1;
    totals->stale_messages += static_cast<std::int64_t>(lives_.back()->snapshot().stale_messages);
    for (const auto& [kind, count] : world_.batches_finished) totals->batches[kind] += count;
  }

 private:
  void DrawConfig() {
    config_.num_workers = static_cast<int>(world_.Between(1, 4));
    config_.num_experts = world_.Between(1, 12);
    config_.topk = 2;
    config_.layers = {0, 1};
    config_.max_batch_tokens = 16;
    config_.single_source_tokens = world_.Chance(0.5) ? 4 : 1;
    config_.num_slots = static_cast<int>(world_.Between(1, 3));
    config_.queue_capacity = world_.Between(1, 6);
    config_.batch_window_us = world_.Chance(0.5) ? world_.Between(100, 5 * kMs) : 0;
    config_.merge_queued = world_.Chance(0.5);
    config_.input_is_told = world_.Chance(0.5);
    world_.on_cpus = world_.Chance(0.5);
    config_.trigger = world_.Chance(0.5) ? TriggerMode::kSeparate : TriggerMode::kTogether;
    constexpr CountExchangeMode kModes[] = {
        CountExchangeMode::kAuto, CountExchangeMode::kCoordinator, CountExchangeMode::kDevice};
    config_.count_exchange = kModes[world_.Between(0, 2)];
    config_.lease_us = 100 * kMs;
    config_.epoch_pace_us = kEpochPaceUs;
    config_.probe_backoff_us = 20 * kMs;
    config_.formation_timeout_us = 300 * kMs;
    config_.batch_timeout_us = 400 * kMs;
    config_.drain_timeout_us = 200 * kMs;
    fault_interval_us_ = world_.Between(50 * kMs, 800 * kMs);
  }

  int ListeningLife() const { return listening_ ? static_cast<int>(lives_.size()) : 0; }
  SimCoordinator* coordinator() { return listening_ ? lives_.back().get() : nullptr; }

  void StartCoordinator() {
    config_.start_us = world_.now();
    config_.initial_epoch = 1 + static_cast<EpochId>(world_.now() / kEpochPaceUs);
    lives_.push_back(std::make_unique<SimCoordinator>(world_, network_, config_,
                                                      static_cast<int>(lives_.size()) + 1));
    listening_ = true;
    world_.Trace(absl::StrCat("coordinator ", lives_.size(), " starts"));
  }

  void StopCoordinator() {
    if (!listening_) return;
    listening_ = false;
    lives_.back()->Die();
    // Not within the second that it stopped in, as epoch numbers begin from the clock.
    const TimeUs most_us = world_.Chance(0.5) ? 30 * kMs : 300 * kMs;
    world_.At(world_.now() + world_.Between(kEpochPaceUs, most_us), [this] { StartCoordinator(); });
  }

  void NextRequest() {
    world_.At(world_.now() + world_.Between(0, 16 * kMs), [this] {
      if (!requests_flow_) return;
      if (SimCoordinator* c = coordinator()) {
        const std::int64_t burst = world_.Chance(0.1) ? 8 : 1;
        for (std::int64_t i = 0; i < burst; ++i) OneRequest(c);
      }
      NextRequest();
    });
  }

  void OneRequest(SimCoordinator* c) {
    RequestArrived request;
    request.caller = static_cast<CallerId>(world_.Between(0, world_.Chance(0.5) ? 0 : 3));
    request.layer = world_.Between(0, world_.Chance(0.02) ? 2 : 1);
    request.row_type = world_.Chance(0.8) ? RowType::kBf16 : RowType::kFp32;
    request.routed = world_.Chance(0.6);
    request.num_tokens = world_.Between(0, 17);
    if (world_.Chance(0.3)) request.deadline_us = world_.now() + world_.Between(-1, 60 * kMs);
    const RequestId id = c->Arrive(request);
    if (!world_.Chance(0.2)) return;
    world_.At(world_.now() + world_.Between(0, 30 * kMs), [this, c, id] {
      if (c == coordinator()) c->Cancel(id);
    });
  }

  void NextFault() {
    world_.At(world_.now() + world_.Between(0, fault_interval_us_), [this] {
      if (!world_.faults) return;
      OneFault();
      NextFault();
    });
  }

  void OneFault() {
    SimWorker& worker =
        *workers_[world_.Between(0, static_cast<std::int64_t>(workers_.size()) - 1)];
    SimCoordinator* c = coordinator();
    switch (world_.Between(0, 12)) {
      case 0:
      case 1:
        return worker.Kill();
      case 2:
      case 3:
        return worker.Pause(world_.Between(10 * kMs, 300 * kMs));
      case 4:
      case 5:
      case 6:
        return worker.BreakStream();
      case 7:
        return worker.Leave();
      case 8:
        return StopCoordinator();
      case 9:
        if (c != nullptr) c->Stall(world_.Between(1 * kMs, 250 * kMs));
        return;
      case 10:
        if (c != nullptr) c->Drain(world_.Chance(0.9) ? worker.id() : "nobody");
        return;
      case 11:
        if (c != nullptr && world_.Chance(0.3)) {
          c->DrainAll();
          WaitForDrain(c);
        }
        return;
      case 12:
        if (c != nullptr) c->Hold(world_.Between(1 * kMs, 60 * kMs));
        return;
    }
  }

  void WaitForDrain(SimCoordinator* c) {
    if (c != coordinator()) return;
    if (c->drained()) return StopCoordinator();
    world_.At(world_.now() + 10 * kMs, [this, c] { WaitForDrain(c); });
  }

  // However bad it was: soon after the last fault a request is answered again.
  void ExpectServiceComesBack() {
    const TimeUs give_up_us = world_.now() + 5000 * kMs;
    while (!world_.failed() && world_.now() < give_up_us) {
      SimCoordinator* c = coordinator();
      RequestId id = 0;
      if (c != nullptr && c->serving()) id = c->Arrive({.num_tokens = 5});
      world_.RunUntil(world_.now() + 20 * kMs);
      if (id != 0 && world_.requests[id].ok) return;
    }
    world_.Fail("the service did not come back after the last fault");
  }

  void ExpectDrains() {
    requests_flow_ = false;
    SimCoordinator* c = coordinator();
    if (world_.failed()) return;
    if (c == nullptr) return world_.Fail("the coordinator is gone");
    c->DrainAll();
    world_.RunUntil(world_.now() + config_.drain_timeout_us + 100 * kMs);
    if (world_.failed()) return;
    if (!c->drained()) return world_.Fail("the coordinator did not drain");
    for (const auto& [id, request] : world_.requests) {
      if (!request.ended) return world_.Fail(absl::StrCat("request ", id, " never ended"));
    }
    const Snapshot snapshot = c->snapshot();
    if (snapshot.queued_requests + snapshot.requests_in_flight + snapshot.batches_in_flight != 0) {
      world_.Fail("something is left after the drain");
    }
  }

  World world_;
  Network network_;
  Exchanges exchanges_;
  Config config_;
  std::vector<std::unique_ptr<SimCoordinator>> lives_;
  std::vector<std::unique_ptr<SimWorker>> workers_;
  TimeUs fault_interval_us_ = 0;
  bool listening_ = false;
  bool requests_flow_ = true;
};

std::int64_t EnvOr(const char* name, std::int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoll(value, nullptr, 10);
}

TEST(SimulationTest, EverySeededScheduleKeepsEveryPromise) {
  if (const char* seed = std::getenv("EPSERVE_SIM_SEED")) {
    Schedule schedule(std::strtoull(seed, nullptr, 10), true);
    EXPECT_EQ(schedule.Run(), "");
    return;
  }
#ifdef EPSERVE_SANITIZED
  const std::int64_t num_schedules = EnvOr("EPSERVE_SIM_SCHEDULES", 1000);
#else
  const std::int64_t num_schedules = EnvOr("EPSERVE_SIM_SCHEDULES", 10'000);
#endif
  Totals totals;
  for (std::int64_t seed = 1; seed <= num_schedules; ++seed) {
    Schedule schedule(static_cast<std::uint64_t>(seed), false);
    const std::string failure = schedule.Run();
    ASSERT_EQ(failure, "") << "seed " << seed << "; replay with EPSERVE_SIM_SEED=" << seed
                           << " state_machine_simulation_test";
    schedule.AddTo(&totals);
  }
  std::cout << num_schedules << " schedules: " << totals.requests << " requests, "
            << totals.requests_ok << " ok, " << totals.epochs << " epochs, "
            << totals.coordinator_lives << " coordinators, " << totals.processes << " workers, "
            << totals.stale_messages << " stale messages; batches counted by coordinator "
            << totals.batches[CountExchange::kCoordinator] << ", over streams "
            << totals.batches[CountExchange::kStreams] << ", by workers "
            << totals.batches[CountExchange::kDevice] << "\n";
  EXPECT_GT(totals.requests_ok, 3 * num_schedules);
  EXPECT_GT(totals.epochs, 2 * num_schedules);
  EXPECT_GT(totals.coordinator_lives, num_schedules);
  EXPECT_GT(totals.stale_messages, num_schedules);
  for (const CountExchange kind :
       {CountExchange::kCoordinator, CountExchange::kStreams, CountExchange::kDevice}) {
    EXPECT_GT(totals.batches[kind], num_schedules / 2) << CountExchangeName(kind);
  }
}

TEST(SimulationTest, SameSeedGivesTheSameSchedule) {
  for (const std::uint64_t seed : {7, 8}) {
    Totals totals[2];
    for (Totals& one : totals) {
      Schedule schedule(seed, false);
      schedule.Run();
      schedule.AddTo(&one);
    }
    EXPECT_EQ(totals[0].requests, totals[1].requests);
    EXPECT_EQ(totals[0].stale_messages, totals[1].stale_messages);
    EXPECT_EQ(totals[0].processes, totals[1].processes);
  }
}

}  // namespace
}  // namespace epserve::coordinator::sim
