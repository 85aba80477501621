#include "server/worker/lease.h"

#include <gtest/gtest.h>

namespace epserve::worker {
namespace {

TEST(LeaseTest, CountsFromWhenTheHeartbeatWasSent) {
  Lease lease;
  lease.Enter(5);
  EXPECT_FALSE(lease.IsFreshAt(0));
  EXPECT_TRUE(lease.Renew(5, 1000, 100));
  EXPECT_TRUE(lease.IsFreshAt(1099));
  EXPECT_FALSE(lease.IsFreshAt(1100));
}

TEST(LeaseTest, LateAnswerToAnOlderHeartbeatDoesNotShortenIt) {
  Lease lease;
  lease.Enter(5);
  lease.Renew(5, 1000, 100);
  EXPECT_TRUE(lease.Renew(5, 900, 100));
  EXPECT_TRUE(lease.IsFreshAt(1099));
}

TEST(LeaseTest, GrantOfAnotherEpochIsNone) {
  Lease lease;
  lease.Enter(5);
  EXPECT_FALSE(lease.Renew(4, 1000, 100));
  EXPECT_FALSE(lease.Renew(6, 1000, 100));
  EXPECT_FALSE(lease.Renew(0, 1000, 100));
  EXPECT_FALSE(lease.IsFreshAt(1000));
}

TEST(LeaseTest, EnteringANewEpochStartsWithoutOne) {
  Lease lease;
  lease.Enter(5);
  lease.Renew(5, 1000, 1'000'000);
  lease.Enter(6);
  EXPECT_FALSE(lease.IsFreshAt(1001));
  EXPECT_EQ(lease.epoch(), 6u);
}

TEST(LeaseTest, NothingIsGrantedOutsideAnEpoch) {
  Lease lease;
  lease.Enter(5);
  lease.Renew(5, 1000, 100);
  lease.Leave();
  EXPECT_FALSE(lease.IsFreshAt(1001));
  EXPECT_FALSE(lease.Renew(0, 1000, 100));
  EXPECT_FALSE(lease.Renew(5, 1000, 100));
}

TEST(HeartbeatIntervalTest, IsAQuarterOfALeaseAndShorterUntilOneIsHeld) {
  EXPECT_EQ(HeartbeatIntervalUs(true, 1'000'000), 250'000);
  EXPECT_EQ(HeartbeatIntervalUs(false, 1'000'000), 100'000);
  EXPECT_EQ(HeartbeatIntervalUs(false, 100'000), 25'000)
      << "an epoch's first lease must not run out";
  EXPECT_EQ(HeartbeatIntervalUs(false, 0), 12'500) << "the first of all may be of the shortest";
  EXPECT_EQ(HeartbeatIntervalUs(true, 50), 5'000);
}

}  // namespace
}  // namespace epserve::worker
