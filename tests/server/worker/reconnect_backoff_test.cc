#include "server/worker/reconnect_backoff.h"

#include <gtest/gtest.h>

namespace epserve::worker {
namespace {

TEST(ReconnectBackoffTest, DelaysGrowToTheirLimitAndStartAnewAfterASuccess) {
  ReconnectBackoff backoff;
  const ReconnectBackoff::TimePoint now;
  const int full_ms[] = {50, 100, 200, 300, 300};
  for (int round = 0; round < 2; ++round) {
    for (const int full : full_ms) {
      const absl::Duration delay = backoff.Failed(now).delay;
      EXPECT_GE(delay, absl::Milliseconds(full) / 2);
      EXPECT_LE(delay, absl::Milliseconds(full));
    }
    backoff.Succeeded();
  }
}

TEST(ReconnectBackoffTest, FirstFailureIsLoggedAndThenOneEveryTenSeconds) {
  ReconnectBackoff backoff;
  ReconnectBackoff::TimePoint now;
  int logged = 0;
  for (int second = 0; second <= 25; ++second) {
    const auto attempt = backoff.Failed(now);
    EXPECT_EQ(attempt.away, absl::Seconds(second));
    logged += attempt.log ? 1 : 0;
    now += std::chrono::seconds(1);
  }
  EXPECT_EQ(logged, 3);
  backoff.Succeeded();
  const auto first = backoff.Failed(now);
  EXPECT_TRUE(first.log);
  EXPECT_EQ(first.away, absl::ZeroDuration());
}

}  // namespace
}  // namespace epserve::worker
