// Workers: joining, ranks, heartbeats and leases, leaving, and being lost.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/coordinator/state_machine/state_machine_impl.h"

namespace epserve::coordinator {
namespace {

constexpr std::size_t kMaxShownBytes = 64;  // of a name that a caller gave

}  // namespace

void StateMachine::Impl::On(const WorkerHello& event) {
  if (membership_.Find(event.stream) != nullptr) return Stale();
  if (event.worker_id.empty() || event.incarnation.empty()) {
    Emit(RejectWorker{event.stream, absl::StatusCode::kInvalidArgument,
                      "hello: worker_id or incarnation is empty; give the worker a --worker-id"});
    return;
  }
  // Epoch numbers follow the unix seconds, so one far ahead of them is no epoch that ever was, and
  // those after it would be numbered from there. Its own epochs a coordinator always knows again.
  const auto seconds_up = static_cast<EpochId>((now_us_ - config_.start_us) / 1'000'000);
  const EpochId limit = std::max(config_.initial_epoch + seconds_up + (EpochId{1} << 31), epoch_);
  if (event.last_epoch > limit) {
    Emit(RejectWorker{event.stream, absl::StatusCode::kInvalidArgument,
                      absl::StrCat("hello: last_epoch ", event.last_epoch, " exceeds ", limit,
                                   "; restart the worker")});
    return;
  }
  // Heaps of different backends cannot be opened by one another.
  for (const auto& [stream, other] : membership_.sessions()) {
    if (other.worker_id == event.worker_id || other.backend == event.backend) continue;
    Emit(RejectWorker{event.stream, absl::StatusCode::kInvalidArgument,
                      absl::StrCat("join: worker ", absl::CHexEscape(event.worker_id),
                                   " has backend ", absl::CHexEscape(event.backend),
                                   ", which differs from worker ", other.worker_id, "'s ",
                                   other.backend, "; give all workers the same --backend")});
    return;
  }
  if (config_.count_exchange == CountExchangeMode::kDevice && !event.device_counts) {
    Emit(RejectWorker{event.stream, absl::StatusCode::kInvalidArgument,
                      absl::StrCat("join: worker ", absl::CHexEscape(event.worker_id),
                                   " has backend ", absl::CHexEscape(event.backend),
                                   ", whose ranks do not exchange counts among themselves, as "
                                   "--count-exchange=device demands; give the coordinator "
                                   "--count-exchange=auto or coordinator")});
    return;
  }
  if (Session* older = membership_.FindWorker(event.worker_id)) {
    // A process that is gone has taken its stream with it, or falls silent. One that is alive keeps
    // its name: two of one name would otherwise throw each other out for ever.
    if (older->incarnation != event.incarnation && !older->process_ended &&
        now_us_ < HeardUntil(*older)) {
      Emit(CloseStream{event.stream,
                       absl::StrCat("worker id ", event.worker_id,
                                    " is held by another process that is alive; give every "
                                    "worker a --worker-id of its own"),
                       /*turned_away=*/true});
      return;
    }
    LoseWorker(*older, "a newer connection of the same worker id replaced it", true);
  }
  // This very process touches no peer any more, so nobody need wait for its old lease.
  membership_.LiftFence(event.worker_id, event.incarnation);
  next_epoch_ = std::max(next_epoch_, event.last_epoch + 1);

  Session session;
  session.stream = event.stream;
  session.worker_id = event.worker_id;
  session.incarnation = event.incarnation;
  session.last_epoch = event.last_epoch;
  session.backend = event.backend;
  session.device_counts = event.device_counts;
  const bool same_placement = event.held_num_ranks == config_.num_workers && event.held_rank >= 0 &&
                              event.held_rank < config_.num_workers;
  session.held_rank = same_placement ? event.held_rank : -1;
  session.last_heartbeat_us = now_us_;
  membership_.Add(std::move(session));
  Log(Notice::Level::kInfo, "worker_joined",
      {{"worker", event.worker_id},
       {"held_rank", same_placement ? event.held_rank : -1},
       {"last_epoch", event.last_epoch}});
}

// At a fresh start the ranks of those who still hold weights are kept for them for one lease. If R
// workers came and none of them holds any, this is no restart of the coordinator's alone.
bool StateMachine::Impl::OnlyHoldersGetRanks() const {
  if (!fresh_ || now_us_ >= config_.start_us + config_.lease_us) return false;
  const bool cold_start = static_cast<int>(membership_.sessions().size()) >= config_.num_workers &&
                          membership_.NobodyHoldsWeights();
  return !cold_start;
}

void StateMachine::Impl::AssignRanks() {
  const bool only_holders = OnlyHoldersGetRanks();
  for (Session* session : membership_.AssignFreeRanks(only_holders)) {
    session->state = WorkerState::kLoading;
    session->loaded_bytes = 0;
    session->total_bytes = 0;
    Emit(AssignRank{session->stream, session->rank, placement_});
    Log(Notice::Level::kInfo, "rank_assigned",
        {{"worker", session->worker_id},
         {"rank", session->rank},
         {"first_expert", placement_.first_expert[session->rank]},
         {"num_experts", placement_.num_local_experts(session->rank)}});
  }
  for (auto& [stream, session] : membership_.sessions()) {
    if (session.state != WorkerState::kStandby || session.told_standby) continue;
    session.told_standby = true;
    const bool full = membership_.NumRanksTaken() == config_.num_workers;
    Emit(SendStandby{stream, full ? absl::StrCat("all ", config_.num_workers, " ranks are taken")
                                  : "ranks are kept one lease for workers that hold weights"});
  }
}

void StateMachine::Impl::On(const WorkerLoadProgress& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr || session->state != WorkerState::kLoading) return Stale();
  session->loaded_bytes = event.loaded_bytes;
  session->total_bytes = event.total_bytes;
}

void StateMachine::Impl::On(const WorkerLoaded& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr || session->state != WorkerState::kLoading ||
      event.rank != session->rank || event.num_ranks != config_.num_workers) {
    return Stale();
  }
  session->state = WorkerState::kLoaded;
  session->weight_bytes = event.weight_bytes;
  session->heap_bytes = event.heap_bytes;
  session->loaded_bytes = std::max(session->loaded_bytes, session->total_bytes);
  Log(Notice::Level::kInfo, "worker_loaded",
      {{"worker", session->worker_id},
       {"rank", session->rank},
       {"weight_bytes", event.weight_bytes}});
}

void StateMachine::Impl::On(const Heartbeat& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr) return Stale();
  session->last_heartbeat_us = now_us_;
  session->resident_bytes = event.resident_bytes;
  if (event.epoch == 0) return;
  if (event.epoch != epoch_ || !IsMember(*session)) return Stale();
  session->lease_until_us = now_us_ + config_.lease_us;
  Emit(GrantLease{event.stream, event.epoch, event.sent_us, config_.lease_us});
}

void StateMachine::Impl::On(const WorkerLeaving& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr) return Stale();
  BeginDrain(*session, event.reason.empty() ? "it asked to leave" : event.reason);
}

void StateMachine::Impl::On(const WorkerFailure& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr) return Stale();
  if (IsMember(*session) && stage_ != Stage::kServing) BackOff();
  LoseWorker(*session,
             absl::StrCat("it failed: ", absl::StatusCodeToString(event.code), ": ", event.message),
             true);
}

void StateMachine::Impl::On(const StreamClosed& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr) return;
  LoseWorker(*session, "its stream closed", false);
}

// Its stream, where that is still open, ends by itself, and what the worker said last comes first.
void StateMachine::Impl::On(const ProcessEnded& event) {
  membership_.LiftFence(event.worker_id, event.incarnation);
  Session* session = membership_.FindWorker(event.worker_id);
  if (session == nullptr || session->incarnation != event.incarnation) return;
  session->process_ended = true;
}

void StateMachine::Impl::LoseWorker(Session& session, const std::string& reason,
                                    bool close_stream) {
  const std::string name = session.Name();
  const StreamId stream = session.stream;
  const bool was_member = IsMember(session);
  const bool left = session.state == WorkerState::kLeaving;
  Log(left ? Notice::Level::kInfo : Notice::Level::kWarning, left ? "worker_left" : "worker_lost",
      {{"worker", session.worker_id}, {"rank", session.rank}, {"reason", reason}});
  for (const std::uint64_t token : session.drain_tokens) {
    Emit(DrainWorkerDone{token, absl::StatusCode::kOk, ""});
  }
  membership_.AddFence(session, now_us_);
  membership_.Remove(stream);
  if (close_stream) Emit(CloseStream{stream, reason});
  if (was_member) EndEpoch(absl::StrCat(name, " was lost: ", reason));
}

std::int64_t StateMachine::Impl::ExpertsWithoutWorker() const {
  std::int64_t missing = 0;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    if (membership_.AtRank(rank) == nullptr) missing += placement_.num_local_experts(rank);
  }
  return missing;
}

// ---- silence

TimeUs StateMachine::Impl::HeardUntil(const Session& session) const {
  return std::max(session.last_heartbeat_us + config_.lease_us, stall_grace_until_us_);
}

void StateMachine::Impl::ExpireWorkers() {
  std::vector<std::pair<StreamId, std::string>> lost;
  for (const auto& [stream, session] : membership_.sessions()) {
    if (now_us_ >= HeardUntil(session)) {
      lost.emplace_back(stream, absl::StrCat("no heartbeat for ", config_.lease_us / 1000, " ms"));
    } else if (session.state == WorkerState::kQuiescing &&
               now_us_ >= session.state_since_us + config_.formation_timeout_us) {
      lost.emplace_back(stream, absl::StrCat("it did not leave epoch ", session.epoch, " within ",
                                             config_.formation_timeout_us / 1000, " ms"));
    }
  }
  for (const auto& [stream, reason] : lost) {
    if (Session* session = membership_.Find(stream)) LoseWorker(*session, reason, true);
  }
}

TimeUs StateMachine::Impl::NextWorkerDeadline() const {
  TimeUs next_us = kNever;
  bool unassigned = false;
  for (const auto& [stream, session] : membership_.sessions()) {
    next_us = std::min(next_us, HeardUntil(session));
    if (session.state == WorkerState::kQuiescing) {
      next_us = std::min(next_us, session.state_since_us + config_.formation_timeout_us);
    }
    if (session.state == WorkerState::kServing || session.state == WorkerState::kLeaving) {
      next_us = std::min(next_us, session.drain_deadline_us);
    }
    unassigned |= session.state == WorkerState::kStandby;
  }
  if (unassigned && OnlyHoldersGetRanks() && membership_.NumRanksTaken() < config_.num_workers) {
    next_us = std::min(next_us, config_.start_us + config_.lease_us);
  }
  return next_us;
}

// ---- leaving

void StateMachine::Impl::On(const DrainWorker& event) {
  Session* session = membership_.FindWorker(event.worker_id);
  if (session == nullptr) {
    Emit(DrainWorkerDone{
        event.token, absl::StatusCode::kNotFound,
        absl::StrCat("drain: worker '", absl::CHexEscape(event.worker_id.substr(0, kMaxShownBytes)),
                     "' is not connected; see epserve status")});
    return;
  }
  session->drain_tokens.push_back(event.token);
  BeginDrain(*session, "the operator drains it");
}

void StateMachine::Impl::BeginDrain(Session& session, std::string reason) {
  if (session.draining) return;
  session.draining = true;
  session.drain_reason = std::move(reason);
  session.drain_deadline_us = now_us_ + config_.drain_timeout_us;
  Log(Notice::Level::kInfo, "worker_draining",
      {{"worker", session.worker_id}, {"reason", session.drain_reason}});
  if (!IsMember(session)) return;
  if (stage_ != Stage::kServing) {
    EndEpoch(absl::StrCat(session.Name(), " is leaving"), Notice::Level::kInfo);
  } else if (!epoch_closing_) {
    const bool was_serving = accepting();
    epoch_closing_ = true;
    if (was_serving) Emit(SetServing{false, epoch_});
  }
}

// A worker is sent away once what was accepted is done and it has left its epoch.
void StateMachine::Impl::AdvanceDrains() {
  if (epoch_closing_ && queue_.num_queued() == 0 && batches_.empty()) {
    for (const auto& [stream, session] : membership_.sessions()) {
      if (session.draining && IsMember(session)) {
        EndEpoch(absl::StrCat(session.Name(), " is leaving"), Notice::Level::kInfo);
        break;
      }
    }
  }
  for (auto& [stream, session] : membership_.sessions()) {
    if (!session.draining || session.epoch != 0 || session.state == WorkerState::kLeaving) continue;
    membership_.FreeRank(session);
    session.state = WorkerState::kLeaving;
    session.drain_deadline_us = now_us_ + config_.drain_timeout_us;
    Emit(SendShutdown{stream, session.drain_reason});
  }
}

void StateMachine::Impl::ExpireDrains() {
  std::vector<StreamId> late;
  for (const auto& [stream, session] : membership_.sessions()) {
    if (now_us_ >= session.drain_deadline_us) late.push_back(stream);
  }
  for (const StreamId stream : late) {
    Session* session = membership_.Find(stream);
    if (session == nullptr) continue;
    const std::string timeout = absl::StrCat(config_.drain_timeout_us / 1000, " ms");
    if (session->state == WorkerState::kServing && IsMember(*session)) {
      EndEpoch(
          absl::StrCat(session->Name(), " is leaving and its batches took longer than ", timeout));
    } else if (session->state == WorkerState::kLeaving) {
      for (const std::uint64_t token : std::exchange(session->drain_tokens, {})) {
        Emit(DrainWorkerDone{
            token, absl::StatusCode::kDeadlineExceeded,
            absl::StrCat("drain: worker ", session->worker_id, " did not exit within ", timeout,
                         "; its stream was closed")});
      }
      LoseWorker(*session, absl::StrCat("it did not exit within ", timeout), true);
    }
  }
}

void StateMachine::Impl::On(const DrainCluster&) {
  if (cluster_draining_) return Stale();
  const bool was_serving = accepting();
  cluster_draining_ = true;
  cluster_drain_deadline_us_ = now_us_ + config_.drain_timeout_us;
  if (was_serving) Emit(SetServing{false, epoch_});
}

void StateMachine::Impl::AdvanceClusterDrain() {
  if (!cluster_draining_ || cluster_drained_) return;
  const bool idle = stage_ != Stage::kServing || (queue_.num_queued() == 0 && batches_.empty());
  if (!idle && now_us_ < cluster_drain_deadline_us_) return;
  cluster_drained_ = true;
  EndEpoch("the coordinator is shutting down", Notice::Level::kInfo);
  Emit(ClusterDrained{});
}

}  // namespace epserve::coordinator
