// What a worker is in the middle of, and what it must do about each thing that happens: the pure
// half of the daemon. Events in, actions out; no clock, thread, stream or engine.
//
//   kDisconnected ─stream opened─► kJoining ─assignment─► kLoading ─loaded─► kLoaded
//        ▲                            └─standby─► kStandby ─assignment─► kLoading
//        │                                                                  │ CreateHeap
//   stream lost                  kLoaded ◄─ended─ kServing ◄─started─ kPeersOpen ◄─OpenPeers─ kHeap
//
// Invariants: an epoch is entered only if it is newer than every one that was entered or ended
// before; an event of another epoch than the present one changes nothing (but EpochEnded of a newer
// epoch than any known, which is answered, because it is true). The weights held outlive the
// stream.
//
// The caller runs the actions in order, and calls nothing else between them. Used by one thread.
#ifndef EPSERVE_SERVER_WORKER_SESSION_STATE_H_
#define EPSERVE_SERVER_WORKER_SESSION_STATE_H_

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "server/worker/control_messages.h"

namespace epserve::worker {

enum class SessionPhase {
  kDisconnected,
  kJoining,  // hello is out
  kStandby,  // every rank is taken
  kLoading,
  kLoaded,     // weights held, no epoch
  kHeap,       // the epoch's own heap is there
  kPeersOpen,  // the peers' heaps are mapped, shards may arrive
  kServing,
};
std::string_view SessionPhaseName(SessionPhase phase);

enum class SessionAction {
  kStartLoad,     // load `wanted()`, then report OnLoaded
  kSendLoaded,    // the weights of `wanted()` are there
  kCreateHeap,    // of `epoch()`; answer the handle
  kOpenPeers,     // answer the probe's output
  kStartEpoch,    // the heap may be sealed, the shards may run
  kEndEpoch,      // abort, wait for the slots, unmap and drop the heap
  kSendQuiesced,  // of `quiesced_epoch()`
  kDropStream,    // this stream cannot go on; a new one starts afresh
};

class SessionState {
 public:
  using Actions = std::vector<SessionAction>;

  SessionPhase phase() const { return phase_; }
  // Joined, and nothing is left to load: in reserve, or with weights, in an epoch or not.
  bool settled() const {
    return phase_ == SessionPhase::kStandby || phase_ >= SessionPhase::kLoaded;
  }
  std::uint64_t epoch() const { return epoch_; }  // 0: in none
  std::uint64_t last_epoch() const { return last_epoch_; }
  std::uint64_t quiesced_epoch() const { return quiesced_epoch_; }
  const std::optional<Assignment>& wanted() const { return wanted_; }
  // What is in memory; nothing while a load runs.
  const std::optional<Assignment>& held() const { return held_; }
  bool loading() const { return loading_.has_value(); }

  Actions OnStreamOpened();
  Actions OnStreamLost();
  Actions OnStandby();
  Actions OnAssignment(const Assignment& assignment);
  Actions OnLoaded();  // REQUIRES: loading()
  Actions OnCreateHeap(std::uint64_t epoch);
  Actions OnOpenPeers(std::uint64_t epoch);
  Actions OnEpochStarted(std::uint64_t epoch);
  Actions OnEpochEnded(std::uint64_t epoch);
  // This worker may not go on with `epoch`, because its lease ran out. It leaves unasked, which
  // ends the epoch for all; it stays connected.
  Actions OnLeaseExpired(std::uint64_t epoch);
  // Its own heap or a peer's could not be had: the coordinator gives the worker up and takes it in
  // afresh.
  Actions OnEpochFailed(std::uint64_t epoch);

 private:
  bool InEpoch() const { return epoch_ != 0; }
  void LeaveEpoch(Actions& actions);

  SessionPhase phase_ = SessionPhase::kDisconnected;
  std::uint64_t epoch_ = 0;
  std::uint64_t last_epoch_ = 0;   // highest ever entered
  std::uint64_t ended_epoch_ = 0;  // highest ever declared ended
  std::uint64_t quiesced_epoch_ = 0;
  std::optional<Assignment> wanted_;  // of the present stream
  std::optional<Assignment> loading_;
  std::optional<Assignment> held_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_SESSION_STATE_H_
