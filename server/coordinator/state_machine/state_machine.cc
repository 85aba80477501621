#include "server/coordinator/state_machine/state_machine.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "server/coordinator/state_machine/state_machine_impl.h"

namespace epserve::coordinator {

StateMachine::StateMachine(const Config& config) : impl_(std::make_unique<Impl>(config)) {}
StateMachine::~StateMachine() = default;

std::vector<Command> StateMachine::Apply(const Event& event, TimeUs now_us) {
  return impl_->Apply(event, now_us);
}

std::optional<TimeUs> StateMachine::NextDeadline() const {
  const TimeUs deadline_us = impl_->NextDeadline();
  if (deadline_us == kNever) return std::nullopt;
  return deadline_us;
}

bool StateMachine::WantsInputTaken() const { return impl_->WantsInputTaken(); }
Snapshot StateMachine::TakeSnapshot() const { return impl_->TakeSnapshot(); }
Load StateMachine::TakeLoad() const { return impl_->TakeLoad(); }
const runtime::Placement& StateMachine::placement() const { return impl_->placement(); }

StateMachine::Impl::Impl(const Config& config)
    : config_(config),
      placement_(runtime::EvenPlacement(config.num_experts, config.num_workers)),
      now_us_(config.start_us),
      membership_(config.num_workers),
      stall_grace_given_us_(config.start_us),
      next_epoch_(std::max<EpochId>(config.initial_epoch, 1)),
      queue_(config.merge_queued || config.batch_window_us > 0, config.batch_window_us,
             config.max_batch_tokens) {}

void StateMachine::Impl::Log(Notice::Level level, std::string event,
                             std::vector<NoticeField> fields) {
  Emit(Notice{level, std::move(event), std::move(fields)});
}

std::vector<Command> StateMachine::Impl::Apply(const Event& event, TimeUs now_us) {
  now_us_ = std::max(now_us_, now_us);
  out_.clear();
  std::visit([this](const auto& e) { On(e); }, event);
  Settle();
  return std::exchange(out_, {});
}

void StateMachine::Impl::Settle() {
  ExpireRequests();
  AdvanceDrains();
  AssignRanks();
  TryStartEpoch();
  AdvanceHold();
  PumpQueue();
  AdvanceClusterDrain();
  input_taken_ = false;
}

void StateMachine::Impl::On(const Tick&) {
  if (HostStalled()) {
    stall_grace_given_us_ = now_us_;
    stall_grace_until_us_ = now_us_ + config_.lease_us / 4;
  }
  membership_.DropFencesBefore(now_us_);
  ExpireWorkers();
  ExpireFormation();
  ExpireBatches();
  ExpireDrains();
}

// Once a lease at most: a host that is always late must still notice a dead worker.
bool StateMachine::Impl::HostStalled() const {
  const TimeUs due_us = NextDeadline();
  return due_us != kNever && now_us_ - due_us > config_.lease_us / 4 &&
         now_us_ - stall_grace_given_us_ > config_.lease_us;
}

TimeUs StateMachine::Impl::NextDeadline() const {
  TimeUs next_us = std::min({NextWorkerDeadline(), FormationDeadline(), NextBatchDeadline(),
                             queue_.NextRequestDeadline()});
  if (const std::optional<TimeUs> start_us = EpochStart()) next_us = std::min(next_us, *start_us);
  if (cluster_draining_ && !cluster_drained_) {
    next_us = std::min(next_us, cluster_drain_deadline_us_);
  }
  return next_us;
}

ClusterState StateMachine::Impl::cluster_state() const {
  if (cluster_draining_ || epoch_closing_) return ClusterState::kDraining;
  switch (stage_) {
    case Stage::kNone:
      return ClusterState::kWaiting;
    case Stage::kCreatingHeaps:
    case Stage::kOpeningPeers:
      return ClusterState::kForming;
    case Stage::kProbing:
      return ClusterState::kProbing;
    case Stage::kServing:
      return ClusterState::kServing;
  }
  return ClusterState::kWaiting;
}

std::string StateMachine::Impl::WaitingFor() const {
  if (epoch_runs()) return "";
  if (cluster_draining_) return "the coordinator is draining";
  const int joined = membership_.NumRanksTaken();
  if (joined < config_.num_workers) {
    return absl::StrCat("workers: ", joined, " of ", config_.num_workers, " joined");
  }
  for (const auto& [stream, session] : membership_.sessions()) {
    if (session.rank >= 0 && session.state == WorkerState::kLoading) {
      return absl::StrCat(session.Name(), " to load its weights");
    }
    if (session.epoch != 0) return absl::StrCat(session.Name(), " to leave epoch ", session.epoch);
  }
  if (now_us_ < membership_.FencedUntil()) return "the lease of a lost worker to run out";
  if (now_us_ < backoff_until_us_) return "the backoff after a failed epoch";
  return "the lease of an earlier epoch to run out";
}

Load StateMachine::Impl::TakeLoad() const {
  Load load;
  load.epoch = epoch_;
  load.queued_requests = queue_.num_queued();
  load.batches_in_flight = static_cast<std::int64_t>(batches_.size());
  for (const auto& [stream, session] : membership_.sessions()) {
    ++(session.draining ? load.workers_draining
                        : load.workers[static_cast<std::size_t>(session.state)]);
  }
  return load;
}

Snapshot StateMachine::Impl::TakeSnapshot() const {
  Snapshot snapshot;
  snapshot.state = cluster_state();
  snapshot.serving = accepting();
  snapshot.epoch = epoch_;
  snapshot.waiting_for = WaitingFor();
  snapshot.last_epoch_end = last_epoch_end_;
  snapshot.expected_workers = config_.num_workers;
  snapshot.num_experts = config_.num_experts;
  snapshot.experts_without_worker = ExpertsWithoutWorker();
  snapshot.queued_requests = queue_.num_queued();
  snapshot.queue_capacity = config_.queue_capacity;
  snapshot.requests_in_flight = queue_.num_in_flight();
  snapshot.batches_in_flight = static_cast<std::int64_t>(batches_.size());
  snapshot.requests_ok = requests_ok_;
  snapshot.requests_failed = requests_failed_;
  snapshot.stale_messages = stale_messages_;

  std::vector<const Session*> sessions;
  for (const auto& [stream, session] : membership_.sessions()) sessions.push_back(&session);
  std::sort(sessions.begin(), sessions.end(), [](const Session* a, const Session* b) {
    const auto key = [](const Session* s) {
      return std::make_pair(s->rank < 0 ? kNever : s->rank, s->join_order);
    };
    return key(a) < key(b);
  });
  for (const Session* s : sessions) {
    WorkerSnapshot& worker = snapshot.workers.emplace_back();
    worker.stream = s->stream;
    worker.worker_id = s->worker_id;
    worker.incarnation = s->incarnation;
    worker.rank = s->rank;
    worker.state = s->state;
    worker.draining = s->draining;
    if (s->rank >= 0) {
      worker.first_expert = placement_.first_expert[s->rank];
      worker.num_experts = placement_.num_local_experts(s->rank);
    }
    worker.loaded_bytes = s->loaded_bytes;
    worker.total_bytes = s->total_bytes;
    worker.weight_bytes = s->weight_bytes;
    worker.heap_bytes = s->heap_bytes;
    worker.resident_bytes = s->resident_bytes;
    worker.batches = s->batches;
    worker.last_heartbeat_us = s->last_heartbeat_us;
  }
  return snapshot;
}

}  // namespace epserve::coordinator
