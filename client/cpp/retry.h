// When a failed call may be tried again, and after how long. A pure function of its arguments; the
// synchronous and the asynchronous path both ask it.
#ifndef EPSERVE_CLIENT_CPP_RETRY_H_
#define EPSERVE_CLIENT_CPP_RETRY_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace epserve::client {

struct RetryPolicy {
  // Attempts in all, the first among them. 1: nothing is retried. More is opted into: a call that
  // failed UNAVAILABLE may have run, and running it again is harmless but not free.
  int max_attempts = 1;
  // UNAVAILABLE waits this long, doubled with each attempt up to the maximum, less up to half of it
  // at random, so that callers turned away together do not come back together.
  absl::Duration initial_backoff = absl::Milliseconds(50);
  absl::Duration max_backoff = absl::Seconds(2);
};

// The server's word on when to come back, in trailing metadata; for a request on a stream, which
// has none of its own, a parameter of the error in its place.
inline constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";
inline constexpr char kStreamPushbackKey[] = "epserve_retry_pushback_ms";

// That word on the request that failed with `status`, which this library did not retry, or no more;
// nullopt where there is none, or it is "do not".
std::optional<absl::Duration> RetryPushback(const absl::Status& status);

// `status`, which is not OK, with that word, if there is one. Internal to client/cpp.
absl::Status WithPushback(absl::Status status, const std::optional<std::string>& pushback_ms);

// After attempt number `attempt` (from 1) failed with `code`: the time to wait before the next one,
// or nullopt if there is none to be.
//  - UNAVAILABLE is retried after the pushback if there is one, else after the backoff.
//  - RESOURCE_EXHAUSTED is retried only where a pushback says when.
//  - A negative or malformed pushback means "do not retry"; so does every other code.
// `random` in [0, 1) spreads the backoff.
std::optional<absl::Duration> NextAttemptDelay(const RetryPolicy& policy, int attempt,
                                               absl::StatusCode code,
                                               const std::optional<std::string>& pushback_ms,
                                               double random);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_RETRY_H_
