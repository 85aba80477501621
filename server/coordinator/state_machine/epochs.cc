// Epochs: when one may start, its way to serving, and its end.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/coordinator/state_machine/state_machine_impl.h"

namespace epserve::coordinator {

std::optional<TimeUs> StateMachine::Impl::EpochStart() const {
  if (epoch_runs() || cluster_draining_) return std::nullopt;
  // Whoever has not quiesced keeps its rank and is not kLoaded.
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    const Session* session = membership_.AtRank(rank);
    if (session == nullptr || session->state != WorkerState::kLoaded) return std::nullopt;
  }
  TimeUs start_us = std::max(membership_.FencedUntil(), backoff_until_us_);
  start_us = std::max(start_us, config_.start_us + epochs_started_ * config_.epoch_pace_us);
  // What an earlier coordinator's workers may still touch: memory of those who were in its epochs,
  // and clients' regions.
  const bool out_of_reach = membership_.IsWholeLastEpoch() ||
                            (membership_.NobodyWasInAnEpoch() && !config_.client_regions);
  if (fresh_ && !out_of_reach) {
    start_us = std::max(start_us, config_.start_us + config_.lease_us);
  }
  return start_us;
}

void StateMachine::Impl::TryStartEpoch() {
  const std::optional<TimeUs> start_us = EpochStart();
  if (!start_us || now_us_ < *start_us) return;
  epoch_ = next_epoch_++;
  ++epochs_started_;
  fresh_ = false;
  stage_ = Stage::kCreatingHeaps;
  stage_since_us_ = now_us_;
  next_batch_ = 1;
  Log(Notice::Level::kInfo, "epoch_forming", {{"epoch", epoch_}});
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    Session& session = *membership_.AtRank(rank);
    session.epoch = epoch_;
    session.state = WorkerState::kForming;
    session.heap_created = false;
    session.peers_opened = false;
    session.handle.clear();
    session.lease_until_us = 0;
    session.batches = 0;
    Emit(SendCreateHeap{session.stream, epoch_});
  }
}

Session* StateMachine::Impl::Member(StreamId stream, EpochId epoch, Stage stage) {
  Session* session = membership_.Find(stream);
  if (session == nullptr || epoch != epoch_ || !IsMember(*session) || stage_ != stage) {
    Stale();
    return nullptr;
  }
  return session;
}

void StateMachine::Impl::On(const HeapCreated& event) {
  Session* session = Member(event.stream, event.epoch, Stage::kCreatingHeaps);
  if (session == nullptr) return;
  if (session->heap_created) return Stale();
  session->heap_created = true;
  session->handle = event.handle;
  std::vector<std::string> handles;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    const Session& member = *membership_.AtRank(rank);
    if (!member.heap_created) return;
    handles.push_back(member.handle);
  }
  stage_ = Stage::kOpeningPeers;
  stage_since_us_ = now_us_;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    Emit(SendOpenPeers{membership_.AtRank(rank)->stream, epoch_, handles});
  }
}

void StateMachine::Impl::On(const PeersOpened& event) {
  Session* session = Member(event.stream, event.epoch, Stage::kOpeningPeers);
  if (session == nullptr) return;
  if (session->peers_opened) return Stale();
  session->peers_opened = true;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    if (!membership_.AtRank(rank)->peers_opened) return;
  }
  stage_ = Stage::kProbing;
  stage_since_us_ = now_us_;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    Session& member = *membership_.AtRank(rank);
    member.state = WorkerState::kServing;
    Emit(SendEpochStarted{member.stream, epoch_});
  }
  StartProbeBatch();
}

void StateMachine::Impl::On(const ProbeVerified& event) {
  if (stage_ != Stage::kProbing || event.epoch != epoch_ || !probe_answered_) return Stale();
  if (!event.ok) {
    BackOff();
    Log(Notice::Level::kError, "probe_failed", {{"epoch", epoch_}, {"message", event.message}});
    EndEpoch(absl::StrCat("its probe came back wrong: ", event.message));
    return;
  }
  failures_in_a_row_ = 0;
  last_epoch_end_.clear();
  stage_ = Stage::kServing;
  stage_since_us_ = now_us_;
  Emit(SetServing{true, epoch_});
  Log(Notice::Level::kInfo, "epoch_serving", {{"epoch", epoch_}});
}

void StateMachine::Impl::On(const EpochQuiesced& event) {
  Session* session = membership_.Find(event.stream);
  if (session == nullptr || event.epoch == 0 || session->epoch != event.epoch) return Stale();
  const bool unasked = IsMember(*session);
  session->epoch = 0;
  session->lease_until_us = 0;
  session->state = WorkerState::kLoaded;
  if (unasked) EndEpoch(absl::StrCat(session->Name(), " left it"));
}

void StateMachine::Impl::EndEpoch(const std::string& reason, Notice::Level level) {
  if (!epoch_runs()) return;
  const bool was_serving = accepting();
  stage_ = Stage::kNone;
  epoch_closing_ = false;
  probe_answered_ = false;
  last_epoch_end_ = reason;
  Log(level, "epoch_ended", {{"epoch", epoch_}, {"reason", reason}});
  if (was_serving) Emit(SetServing{false, epoch_});
  for (auto& [stream, session] : membership_.sessions()) {
    if (session.epoch != epoch_) continue;
    session.state = WorkerState::kQuiescing;
    session.state_since_us = now_us_;
    Emit(SendEpochEnded{stream, epoch_, reason});
  }
  std::string missing;
  if (const std::int64_t experts = ExpertsWithoutWorker(); experts > 0) {
    missing =
        absl::StrCat("; ", experts, " of ", config_.num_experts, " experts have no live worker");
  }
  DropAllWork(absl::StrCat("infer: epoch ", epoch_, " ended: ", reason, missing,
                           "; retry when the service is ready"));
}

void StateMachine::Impl::BackOff() {
  const std::int64_t factor = std::int64_t{1} << std::min(failures_in_a_row_, 4);
  backoff_until_us_ = now_us_ + factor * config_.probe_backoff_us;
  ++failures_in_a_row_;
}

TimeUs StateMachine::Impl::FormationDeadline() const {
  if (!epoch_runs() || stage_ == Stage::kServing) return kNever;
  return stage_since_us_ + config_.formation_timeout_us;
}

void StateMachine::Impl::ExpireFormation() {
  if (now_us_ < FormationDeadline()) return;
  const std::string timeout = absl::StrCat(config_.formation_timeout_us / 1000, " ms");
  BackOff();
  if (stage_ == Stage::kProbing) {
    const std::string who = batches_.empty() ? "the coordinator did not verify the probe"
                                             : absl::StrCat("the probe waits for ",
                                                            WaitedFor(batches_.begin()->second));
    EndEpoch(absl::StrCat(who, " for ", timeout));
    return;
  }
  // Whoever does not get on here would hold up the next epoch just so.
  const bool creating = stage_ == Stage::kCreatingHeaps;
  const std::string reason = absl::StrCat(
      creating ? "it did not create its heap within " : "it did not open its peers within ",
      timeout);
  std::vector<StreamId> culprits;
  std::vector<std::string> names;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    const Session& member = *membership_.AtRank(rank);
    if (creating ? member.heap_created : member.peers_opened) continue;
    culprits.push_back(member.stream);
    names.push_back(member.Name());
  }
  EndEpoch(absl::StrCat(absl::StrJoin(names, ", "), ": ", reason));
  for (const StreamId stream : culprits) LoseWorker(*membership_.Find(stream), reason, true);
}

}  // namespace epserve::coordinator
