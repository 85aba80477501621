// A worker as the protocol demands it, with everything that can befall one: it is killed, paused
// past its lease, cut off, slow, wrong. Its clock is its own.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_SIM_WORKER_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_SIM_WORKER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/server/coordinator/state_machine/simulation/network.h"
#include "tests/server/coordinator/state_machine/simulation/world.h"

namespace epserve::coordinator::sim {

class SimWorker;

// Flags in symmetric memory: who has pushed, who has published.
struct Exchanges {
  struct Flags {
    std::set<int> counted;
    std::set<int> dispatched;
    std::set<int> combined;
  };
  std::map<std::pair<EpochId, BatchId>, Flags> flags;
  std::vector<SimWorker*> workers;
};

class SimWorker {
 public:
  // `coordinator` gives the life of the coordinator that listens now, 0: none.
  SimWorker(World& world, Network& network, Exchanges& exchanges, const Config& config, int index,
            std::function<int()> coordinator, bool device_counts);

  void StartProcess();
  void Kill();  // Comes back as a new process after a while.
  void Pause(std::int64_t duration_us);
  void BreakStream();
  void Leave();  // SIGTERM
  bool alive() const { return alive_; }
  const std::string& id() const { return id_; }
  void OnFlags(EpochId epoch, BatchId batch);  // A peer raised one.

 private:
  struct Work {
    int slot = 0;
    CountExchange counts = CountExchange::kCoordinator;
    bool separate = false;
    std::int64_t num_tokens = 0;
    bool staged = false, told_counts = false, counted = false;
    bool dispatch_allowed = false, combine_allowed = false;
    bool dispatched = false, computing = false, computed = false, combined = false;
  };

  // Runs `action` in this process, when it is not paused; never in a later process.
  void Later(TimeUs delay_us, std::function<void()> action);
  // The same, and never after the present membership of an epoch.
  void LaterInEpoch(TimeUs delay_us, std::function<void()> action);
  void RunWhenAwake(std::uint64_t process, std::function<void()> action);

  void Connect();
  void Heartbeats(StreamId stream);
  void Receive(StreamId stream, const ToWorker& message);
  void Send(Event event) { network_.ToCoordinator(stream_, std::move(event)); }
  void AbortEpoch();

  void On(const AssignRank& m);
  void On(const SendStandby&) {}
  void On(const SendCreateHeap& m);
  void On(const SendOpenPeers& m);
  void On(const SendEpochStarted& m);
  void On(const SendEpochEnded& m);
  void On(const GrantLease& m);
  void On(const SendShutdown&);
  void On(const RejectWorker& m);
  void On(const ShardMessage& m);
  void On(const MatrixMessage& m);
  void On(const DispatchMessage& m);
  void On(const CombineMessage& m);
  void On(const StreamLost&);

  Work* WorkOf(EpochId epoch, BatchId batch);
  void Advance(BatchId batch);
  void ExchangeCounts(BatchId batch, Work& work);
  void Dispatch(BatchId batch, Work& work);
  void Combine(BatchId batch, Work& work);
  void Done(BatchId batch, absl::StatusCode code, const std::string& message);
  bool LeaseIsFresh() const { return clock_us() < lease_until_us_; }
  TimeUs clock_us() const { return world_.now() + clock_offset_us_; }
  void RaiseFlags(BatchId batch);
  bool Everyone(const std::set<int>& ranks) const {
    return static_cast<int>(ranks.size()) == config_.num_workers;
  }

  World& world_;
  Network& network_;
  Exchanges& exchanges_;
  const Config& config_;
  const std::string id_;
  const std::function<int()> coordinator_;
  const bool device_counts_;  // offered by each of its processes
  const TimeUs clock_offset_us_;

  bool alive_ = false;
  TimeUs paused_until_us_ = 0;
  int process_ = 0;
  StreamId stream_ = 0;  // 0: not connected
  int held_rank_ = -1;
  int rank_ = -1;
  EpochId last_epoch_ = 0;
  EpochId epoch_ = 0;                // member of
  std::uint64_t membership_ = 0;     // counts the memberships
  TimeUs lease_until_us_ = -kNever;  // own clock
  bool shutting_down_ = false;
  std::map<BatchId, Work> work_;
};

}  // namespace epserve::coordinator::sim

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_SIM_WORKER_H_
