#include "server/worker/reconnect_backoff.h"

#include <algorithm>

namespace epserve::worker {
namespace {

// A restarted coordinator is found within the longest of these: most of what its restart costs.
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kLongestBackoff = absl::Milliseconds(300);
constexpr absl::Duration kLogPeriod = absl::Seconds(10);

}  // namespace

ReconnectBackoff::Attempt ReconnectBackoff::Failed(TimePoint now) {
  Attempt attempt;
  if (failed_attempts_ == 0) unreachable_since_ = now;
  attempt.away = absl::FromChrono(now - unreachable_since_);
  attempt.log = failed_attempts_ == 0 || absl::FromChrono(now - logged_) >= kLogPeriod;
  if (attempt.log) logged_ = now;
  const absl::Duration full =
      std::min(kFirstBackoff * (1 << std::min(failed_attempts_, 3)), kLongestBackoff);
  ++failed_attempts_;
  // Workers that lost one coordinator together do not come back all at once.
  attempt.delay = full * std::uniform_real_distribution<double>(0.5, 1.0)(jitter_);
  return attempt;
}

}  // namespace epserve::worker
