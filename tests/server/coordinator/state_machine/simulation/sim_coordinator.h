// One life of the coordinator: the state machine and a host that carries out its commands, and that
// holds every command against what it may be.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_SIM_COORDINATOR_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_SIM_COORDINATOR_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "server/coordinator/state_machine/state_machine.h"
#include "tests/server/coordinator/state_machine/simulation/network.h"
#include "tests/server/coordinator/state_machine/simulation/world.h"

namespace epserve::coordinator::sim {

class SimCoordinator {
 public:
  SimCoordinator(World& world, Network& network, const Config& config, int life);

  int life() const { return life_; }
  bool drained() const { return drained_; }
  bool serving() const { return serving_; }
  Snapshot snapshot() const { return machine_.TakeSnapshot(); }

  void Deliver(const Event& event);  // through the inbox, which waits while the host stalls
  void Stall(std::int64_t duration_us);
  void DrainAll() { Deliver(DrainCluster{}); }
  // A request comes in; returns its id.
  RequestId Arrive(RequestArrived request);
  void Cancel(RequestId id) { Deliver(RequestCancelled{id}); }
  void Drain(const std::string& worker_id);
  // Holds batches for so long at most, and releases them at some time within twice as long.
  void Hold(std::int64_t duration_us);
  // The process dies: callers lose their connections, which ends their requests.
  void Die();

 private:
  struct Stream {
    int process = 0;
    EpochId epoch = 0;        // sent CreateHeap for
    EpochId ended_epoch = 0;  // sent EpochEnded for, or heard EpochQuiesced of
    bool quiesced = true;     // left `epoch`
  };
  struct InFlight {
    int slot = 0;
    bool probe = false;
    CountExchange counts = CountExchange::kCoordinator;
    std::map<StreamId, ShardMessage> held_back;  // to be sent with the counts
    std::set<RequestId> requests;
  };

  void Apply(const Event& event);
  void Note(const Event& event);  // what the host learns before the machine does
  void ArmTick();
  void Wake();

  // Carry out one command.
  void On(const AssignRank& c);
  void On(const SendStandby& c) { Forward(c, 0); }
  void On(const SendCreateHeap& c);
  void On(const SendOpenPeers& c) { Forward(c, c.epoch); }
  void On(const SendEpochStarted& c) { Forward(c, c.epoch); }
  void On(const SendEpochEnded& c);
  void On(const GrantLease& c) { Forward(c, c.epoch); }
  void On(const SendShutdown& c) { Forward(c, 0); }
  void On(const RejectWorker& c);
  void On(const CloseStream& c);
  void On(const StartProbe& c);
  void On(const StartBatch& c);
  void On(const SendCountMatrix& c);
  void On(const SendDispatchTrigger& c);
  void On(const SendCombineTrigger& c);
  void On(const VerifyProbe& c);
  void On(const FinishBatch& c);
  void On(const DropBatch& c);
  void On(const CompleteRequest& c);
  void On(const SetServing& c);
  void On(const BatchesHeld& c);
  void On(const DrainWorkerDone& c);
  void On(const ClusterDrained& c);
  void On(const Notice& c);

  template <typename T>
  void Forward(const T& message, EpochId epoch) {
    if (MayGo(message.stream, epoch)) network_.ToWorkerEnd(message.stream, message);
  }
  // Whether a message of `epoch` (0: of none) may go to `stream`; fails the schedule if not.
  bool MayGo(StreamId stream, EpochId epoch);
  void TakeSlot(BatchId batch, int slot, bool probe, EpochId epoch, CountExchange counts);
  // How a batch must be counted.
  CountExchange ExpectedCounts(bool routed, bool single_source) const;
  void FreeBatch(EpochId epoch, BatchId batch, bool probe);
  void CheckAllDone(EpochId epoch, BatchId batch);
  template <typename T>
  void SendShards(const T& start, bool routed, bool single_source);

  World& world_;
  Network& network_;
  const Config config_;
  const int life_;
  StateMachine machine_;
  bool dead_ = false;
  TimeUs stalled_until_us_ = 0;
  TimeUs armed_us_ = kNever;
  bool input_is_told_ = false;  // InputTaken is on its way

  std::map<StreamId, Stream> streams_;  // open, as the machine knows
  EpochId epoch_ = 0;
  bool serving_ = false;
  EpochId verified_epoch_ = 0;
  std::map<BatchId, InFlight> batches_;
  BatchId last_batch_ = 0;
  std::set<RequestId> inbox_;   // not yet told to the machine
  std::set<RequestId> queued_;  // told, neither ended nor in a batch
  std::set<RequestId> in_flight_;
  std::set<std::uint64_t> drain_tokens_;
  std::uint64_t next_token_ = 1;
  bool drained_ = false;
  TimeUs hold_until_us_ = 0;
  bool held_ = false;  // BatchesHeld has come
};

}  // namespace epserve::coordinator::sim

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_SIM_COORDINATOR_H_
