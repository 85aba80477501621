// The worker's right to touch its peers' memory, on the worker's own steady clock. It is renewed by
// the coordinator's answers to heartbeats and counts from when the heartbeat was SENT, so that
// however late an answer comes, the coordinator sees the lease end no earlier than the worker does.
//
// A lease is given in one epoch and ends with it: the coordinator holds the next epoch back for the
// leases of the epoch that ended, and for no older ones.
//
// Thread-safe.
#ifndef EPSERVE_SERVER_WORKER_LEASE_H_
#define EPSERVE_SERVER_WORKER_LEASE_H_

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>

namespace epserve::worker {

class Lease {
 public:
  // Nothing is held in `epoch` yet, and grants of any other count no more.
  void Enter(std::uint64_t epoch) {
    std::lock_guard<std::mutex> lock(mutex_);
    epoch_ = epoch;
    expires_us_.reset();
  }

  void Leave() { Enter(0); }

  // False where `epoch` is not the present one. Answers may come out of order; an older one never
  // shortens what a newer one gave.
  bool Renew(std::uint64_t epoch, std::int64_t heartbeat_sent_us, std::int64_t duration_us) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (epoch == 0 || epoch != epoch_) return false;
    const std::int64_t expires_us = heartbeat_sent_us + duration_us;
    expires_us_ = std::max(expires_us, expires_us_.value_or(expires_us));
    return true;
  }

  // The epoch that was entered, 0: none.
  std::uint64_t epoch() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return epoch_;
  }

  // Until when it holds; nothing where none was given in this epoch.
  std::optional<std::int64_t> expires_us() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return expires_us_;
  }

  bool IsFreshAt(std::int64_t now_us) const {
    const std::optional<std::int64_t> expires = expires_us();
    return expires.has_value() && now_us < *expires;
  }

 private:
  mutable std::mutex mutex_;
  std::uint64_t epoch_ = 0;
  std::optional<std::int64_t> expires_us_;
};

// How long after a heartbeat the next one is due. `duration_us`: of the last lease granted; 0: none
// was yet, and nobody has said how long one is.
inline std::int64_t HeartbeatIntervalUs(bool holds_lease, std::int64_t duration_us) {
  constexpr std::int64_t kShortestUs = 5'000;
  constexpr std::int64_t kBeforeFirstUs = 12'500;  // a quarter of the shortest lease there is
  constexpr std::int64_t kLongestWithoutUs = 100'000;
  if (duration_us == 0) return kBeforeFirstUs;
  const std::int64_t quarter_us = std::max(duration_us / 4, kShortestUs);
  return holds_lease ? quarter_us : std::min(quarter_us, kLongestWithoutUs);
}

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_LEASE_H_
