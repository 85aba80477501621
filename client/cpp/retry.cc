#include "client/cpp/retry.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/numbers.h"

namespace epserve::client {

std::optional<absl::Duration> NextAttemptDelay(const RetryPolicy& policy, int attempt,
                                               absl::StatusCode code,
                                               const std::optional<std::string>& pushback_ms,
                                               double random) {
  if (attempt >= policy.max_attempts) return std::nullopt;
  if (code != absl::StatusCode::kUnavailable && code != absl::StatusCode::kResourceExhausted) {
    return std::nullopt;
  }
  if (pushback_ms) {
    std::int64_t value_ms = 0;
    if (!absl::SimpleAtoi(*pushback_ms, &value_ms) || value_ms < 0) return std::nullopt;
    return absl::Milliseconds(value_ms);
  }
  if (code == absl::StatusCode::kResourceExhausted) return std::nullopt;
  absl::Duration backoff = policy.initial_backoff;
  for (int i = 1; i < attempt && backoff < policy.max_backoff; ++i) backoff *= 2;
  return std::min(backoff, policy.max_backoff) * (1.0 - 0.5 * random);
}

}  // namespace epserve::client
