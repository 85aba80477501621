// The inside of StateMachine, shared by its source files only: state_machine.cc (Apply, time,
// snapshot), workers.cc (joining, leaving, loss), epochs.cc (forming, probing, ending) and
// batches.cc (requests and batches).
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_IMPL_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_IMPL_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/state_machine/batch.h"
#include "server/coordinator/state_machine/membership.h"
#include "server/coordinator/state_machine/request_queue.h"
#include "server/coordinator/state_machine/state_machine.h"

namespace epserve::coordinator {

class StateMachine::Impl {
 public:
  explicit Impl(const Config& config);

  std::vector<Command> Apply(const Event& event, TimeUs now_us);
  TimeUs NextDeadline() const;  // kNever: none
  Snapshot TakeSnapshot() const;
  Load TakeLoad() const;
  const runtime::Placement& placement() const { return placement_; }
  bool WantsInputTaken() const;

 private:
  enum class Stage { kNone, kCreatingHeaps, kOpeningPeers, kProbing, kServing };

  void Emit(Command command) { out_.push_back(std::move(command)); }
  void Log(Notice::Level level, std::string event, std::vector<NoticeField> fields);
  void Stale() { ++stale_messages_; }

  // state_machine.cc
  void On(const Tick&);
  void Settle();  // whatever the last event made possible
  bool HostStalled() const;
  ClusterState cluster_state() const;
  std::string WaitingFor() const;

  // workers.cc
  void On(const WorkerHello& event);
  void On(const WorkerLoadProgress& event);
  void On(const WorkerLoaded& event);
  void On(const Heartbeat& event);
  void On(const WorkerLeaving& event);
  void On(const WorkerFailure& event);
  void On(const StreamClosed& event);
  void On(const ProcessEnded& event);
  void On(const DrainWorker& event);
  void On(const DrainCluster& event);
  void AssignRanks();
  bool OnlyHoldersGetRanks() const;
  void BeginDrain(Session& session, std::string reason);
  void AdvanceDrains();
  void AdvanceClusterDrain();
  void ExpireWorkers();
  void ExpireDrains();
  TimeUs HeardUntil(const Session& session) const;
  TimeUs NextWorkerDeadline() const;
  // Forgets the session, fences it, ends its epoch for the others. `session` dangles afterwards.
  void LoseWorker(Session& session, const std::string& reason, bool close_stream);
  std::int64_t ExpertsWithoutWorker() const;

  // epochs.cc
  void On(const HeapCreated& event);
  void On(const PeersOpened& event);
  void On(const EpochQuiesced& event);
  void On(const ProbeVerified& event);
  // The live session that speaks for the present epoch in `stage`; null (and counted) if stale.
  Session* Member(StreamId stream, EpochId epoch, Stage stage);
  std::optional<TimeUs> EpochStart() const;  // nullopt: not by time alone
  void TryStartEpoch();
  void EndEpoch(const std::string& reason, Notice::Level level = Notice::Level::kWarning);
  void BackOff();
  void ExpireFormation();
  TimeUs FormationDeadline() const;
  bool epoch_runs() const { return stage_ != Stage::kNone; }
  bool IsMember(const Session& session) const { return epoch_runs() && session.epoch == epoch_; }

  // batches.cc
  void On(const RequestArrived& event);
  void On(const RequestCancelled& event);
  void On(const Counts& event);
  void On(const PhaseDone& event);
  void On(const BatchDone& event);
  void On(const HoldBatches& event);
  void On(const ReleaseBatches& event);
  void On(const InputTaken&) { input_taken_ = true; }
  void AdvanceHold();
  std::optional<CompleteRequest> RefuseAtOnce(const RequestArrived& event) const;
  bool QueueIsFull() const;
  void TurnAwayFor(CallerId caller);
  std::string WhyNotServing() const;
  bool accepting() const {
    return stage_ == Stage::kServing && !epoch_closing_ && !cluster_draining_;
  }
  std::int64_t PushbackMs() const;
  void Complete(RequestId id, absl::StatusCode code, std::string message);
  void ExpireRequests();
  void StartProbeBatch();
  void PumpQueue();
  bool SmallBatchRuns() const;  // REQUIRES: serving
  bool MayStartBatch() const;
  int FreeSlot() const;  // -1: all taken
  // Of a batch of the present epoch. `routed`: its ids are seen here.
  CountExchange ExchangeFor(bool routed, bool single_source) const;
  std::vector<ShardPlan> PlanShards(std::int64_t num_tokens) const;
  // The rank that has all rows of the batch whose first request is `head`; nullopt: all have some.
  std::optional<int> SingleSource(const RequestArrived& head, BatchId batch,
                                  std::int64_t num_tokens) const;
  std::vector<ShardPlan> PlanSingleSource(std::int64_t num_tokens, int source) const;
  Batch* BatchOf(EpochId epoch, BatchId batch);
  void FailBatch(Batch& batch, absl::StatusCode code, const std::string& message);
  void RetireBatch(Batch& batch);
  // Of the present epoch: drops all batches, completes all requests UNAVAILABLE.
  void DropAllWork(const std::string& message);
  void ExpireBatches();
  TimeUs NextBatchDeadline() const;
  std::string WaitedFor(const Batch& batch) const;

  const Config config_;
  const runtime::Placement placement_;
  TimeUs now_us_;
  std::vector<Command> out_;

  Membership membership_;
  TimeUs stall_grace_until_us_ = 0;
  TimeUs stall_grace_given_us_;

  Stage stage_ = Stage::kNone;
  TimeUs stage_since_us_ = 0;
  EpochId epoch_ = 0;  // the present or the last one
  EpochId next_epoch_;
  std::int64_t epochs_started_ = 0;
  bool fresh_ = true;  // No epoch yet: an earlier coordinator's leases may still run.
  TimeUs backoff_until_us_ = 0;
  int failures_in_a_row_ = 0;
  std::string last_epoch_end_;
  bool epoch_closing_ = false;  // A member is leaving; no new requests.

  bool cluster_draining_ = false;
  bool cluster_drained_ = false;
  TimeUs cluster_drain_deadline_us_ = kNever;

  RequestQueue queue_;
  std::map<BatchId, Batch> batches_;
  BatchId next_batch_ = 1;
  bool input_taken_ = false;       // InputTaken is being applied
  bool probe_answered_ = false;    // VerifyProbe is out.
  TimeUs hold_until_us_ = kNever;  // kNever: batches are not held
  TimeUs most_held_us_ = kNever;   // of the hold, from its answer on
  bool hold_answered_ = false;     // BatchesHeld is out
  std::int64_t batch_us_ = 0;      // how long a batch takes, smoothed

  std::uint64_t requests_ok_ = 0;
  std::uint64_t requests_failed_ = 0;
  std::uint64_t stale_messages_ = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_IMPL_H_
