#include "client/cpp/retry.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"

namespace epserve::client {
namespace {

constexpr char kPayloadUrl[] = "epserve/retry-pushback-ms";

// nullopt: "do not retry".
std::optional<absl::Duration> ParsePushback(const std::string& pushback_ms) {
  std::int64_t value_ms = 0;
  if (!absl::SimpleAtoi(pushback_ms, &value_ms) || value_ms < 0) return std::nullopt;
  return absl::Milliseconds(value_ms);
}

}  // namespace

std::optional<absl::Duration> RetryPushback(const absl::Status& status) {
  const auto pushback_ms = status.GetPayload(kPayloadUrl);
  if (!pushback_ms) return std::nullopt;
  return ParsePushback(std::string(*pushback_ms));
}

absl::Status WithPushback(absl::Status status, const std::optional<std::string>& pushback_ms) {
  if (pushback_ms) status.SetPayload(kPayloadUrl, absl::Cord(*pushback_ms));
  return status;
}

std::optional<absl::Duration> NextAttemptDelay(const RetryPolicy& policy, int attempt,
                                               absl::StatusCode code,
                                               const std::optional<std::string>& pushback_ms,
                                               double random) {
  if (attempt >= policy.max_attempts) return std::nullopt;
  if (code != absl::StatusCode::kUnavailable && code != absl::StatusCode::kResourceExhausted) {
    return std::nullopt;
  }
  if (pushback_ms) return ParsePushback(*pushback_ms);
  if (code == absl::StatusCode::kResourceExhausted) return std::nullopt;
  absl::Duration backoff = policy.initial_backoff;
  for (int i = 1; i < attempt && backoff < policy.max_backoff; ++i) backoff *= 2;
  return std::min(backoff, policy.max_backoff) * (1.0 - 0.5 * random);
}

}  // namespace epserve::client
