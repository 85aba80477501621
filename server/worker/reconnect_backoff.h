// When to try the coordinator again, and how often to say that it is away. Used by one thread.
#ifndef EPSERVE_SERVER_WORKER_RECONNECT_BACKOFF_H_
#define EPSERVE_SERVER_WORKER_RECONNECT_BACKOFF_H_

#include <chrono>
#include <random>

#include "absl/time/time.h"

namespace epserve::worker {

class ReconnectBackoff {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  struct Attempt {
    absl::Duration delay;  // before the next attempt
    bool log = false;      // the first failure, and then one every ten seconds
    absl::Duration away;   // since the first failure
  };

  // Another attempt has failed.
  Attempt Failed(TimePoint now);
  // The coordinator has answered: the next failure is a first one.
  void Succeeded() { failed_attempts_ = 0; }

 private:
  TimePoint unreachable_since_;
  TimePoint logged_;
  int failed_attempts_ = 0;
  std::minstd_rand jitter_{std::random_device{}()};
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_RECONNECT_BACKOFF_H_
