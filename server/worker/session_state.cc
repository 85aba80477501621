#include "server/worker/session_state.h"

#include <algorithm>
#include <utility>

namespace epserve::worker {
namespace {

bool Same(const std::optional<Assignment>& a, const std::optional<Assignment>& b) {
  return a.has_value() && b.has_value() && a->rank == b->rank &&
         a->placement.first_expert == b->placement.first_expert;
}

}  // namespace

std::string_view SessionPhaseName(SessionPhase phase) {
  switch (phase) {
    case SessionPhase::kDisconnected:
      return "disconnected";
    case SessionPhase::kJoining:
      return "joining";
    case SessionPhase::kStandby:
      return "standby";
    case SessionPhase::kLoading:
      return "loading";
    case SessionPhase::kLoaded:
      return "loaded";
    case SessionPhase::kHeap:
      return "heap";
    case SessionPhase::kPeersOpen:
      return "peers_open";
    case SessionPhase::kServing:
      return "serving";
  }
  return "unknown";
}

void SessionState::LeaveEpoch(Actions& actions) {
  if (!InEpoch()) return;
  actions.push_back(SessionAction::kEndEpoch);
  ended_epoch_ = std::max(ended_epoch_, epoch_);
  epoch_ = 0;
  phase_ = SessionPhase::kLoaded;
}

SessionState::Actions SessionState::OnStreamOpened() {
  phase_ = SessionPhase::kJoining;
  return {};
}

SessionState::Actions SessionState::OnStreamLost() {
  Actions actions;
  LeaveEpoch(actions);
  wanted_.reset();
  // A coordinator that starts anew may count from where it likes, but for what Hello reports.
  ended_epoch_ = last_epoch_;
  phase_ = SessionPhase::kDisconnected;
  return actions;
}

SessionState::Actions SessionState::OnStandby() {
  if (phase_ == SessionPhase::kJoining) phase_ = SessionPhase::kStandby;
  return {};
}

SessionState::Actions SessionState::OnAssignment(const Assignment& assignment) {
  if (phase_ == SessionPhase::kDisconnected) return {};
  Actions actions;
  LeaveEpoch(actions);
  wanted_ = assignment;
  if (Same(wanted_, held_)) {
    phase_ = SessionPhase::kLoaded;
    actions.push_back(SessionAction::kSendLoaded);
    return actions;
  }
  phase_ = SessionPhase::kLoading;
  if (!loading_) {  // One load at a time; OnLoaded compares what it got with what is wanted then.
    held_.reset();
    loading_ = wanted_;
    actions.push_back(SessionAction::kStartLoad);
  }
  return actions;
}

SessionState::Actions SessionState::OnLoaded() {
  held_ = std::exchange(loading_, std::nullopt);
  if (!wanted_) return {};  // No stream, or none that has given a rank yet.
  if (Same(wanted_, held_)) {
    phase_ = SessionPhase::kLoaded;
    return {SessionAction::kSendLoaded};
  }
  held_.reset();
  loading_ = wanted_;
  return {SessionAction::kStartLoad};
}

SessionState::Actions SessionState::OnCreateHeap(std::uint64_t epoch) {
  const bool loaded = phase_ >= SessionPhase::kLoaded;
  if (!loaded || epoch <= last_epoch_ || epoch <= ended_epoch_) return {};
  Actions actions;
  LeaveEpoch(actions);
  epoch_ = last_epoch_ = epoch;
  phase_ = SessionPhase::kHeap;
  actions.push_back(SessionAction::kCreateHeap);
  return actions;
}

SessionState::Actions SessionState::OnOpenPeers(std::uint64_t epoch) {
  if (phase_ != SessionPhase::kHeap || epoch != epoch_) return {};
  phase_ = SessionPhase::kPeersOpen;
  return {SessionAction::kOpenPeers};
}

SessionState::Actions SessionState::OnEpochStarted(std::uint64_t epoch) {
  if (phase_ != SessionPhase::kPeersOpen || epoch != epoch_) return {};
  phase_ = SessionPhase::kServing;
  return {SessionAction::kStartEpoch};
}

SessionState::Actions SessionState::OnEpochEnded(std::uint64_t epoch) {
  if (phase_ == SessionPhase::kDisconnected) return {};
  // Older than what is known: nothing to end, nothing to say.
  if (epoch < std::max(last_epoch_, ended_epoch_)) return {};
  Actions actions;
  LeaveEpoch(actions);
  ended_epoch_ = quiesced_epoch_ = epoch;
  actions.push_back(SessionAction::kSendQuiesced);
  return actions;
}

SessionState::Actions SessionState::OnLeaseExpired(std::uint64_t epoch) {
  if (!InEpoch() || epoch != epoch_) return {};
  Actions actions;
  LeaveEpoch(actions);
  quiesced_epoch_ = epoch;
  actions.push_back(SessionAction::kSendQuiesced);
  return actions;
}

SessionState::Actions SessionState::OnEpochFailed(std::uint64_t epoch) {
  if (!InEpoch() || epoch != epoch_) return {};
  Actions actions;
  LeaveEpoch(actions);
  actions.push_back(SessionAction::kDropStream);
  return actions;
}

}  // namespace epserve::worker
