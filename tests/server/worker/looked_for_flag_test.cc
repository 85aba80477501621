#include "server/worker/looked_for_flag.h"

#include <gtest/gtest.h>

namespace epserve::worker {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

TEST(LookedForFlagTest, RaisedFlagIsSeenAtOnceAndUntilItIsLowered) {
  LookedForFlag flag;
  EXPECT_FALSE(flag.LookFor({}));
  flag.Raise();
  EXPECT_TRUE(flag.LookFor({}));
  EXPECT_TRUE(flag.LookFor(std::chrono::hours(1)));
  flag.Lower();
  EXPECT_FALSE(flag.LookFor({}));
}

TEST(LookedForFlagTest, LookingEndsAfterItsTimeAndNotBefore) {
  const LookedForFlag flag;
  const auto start = steady_clock::now();
  EXPECT_FALSE(flag.LookFor(milliseconds(5)));
  EXPECT_GE(steady_clock::now() - start, milliseconds(5));
}

TEST(LookedForFlagTest, FlagRaisedByAnotherThreadEndsTheLookAndShowsWhatWasDoneBefore) {
  for (int round = 0; round < 200; ++round) {
    LookedForFlag flag;
    int done = 0;
    std::thread raiser([&] {
      done = 1;
      flag.Raise();
    });
    EXPECT_TRUE(flag.LookFor(std::chrono::hours(1)));
    EXPECT_EQ(done, 1);
    raiser.join();
  }
}

}  // namespace
}  // namespace epserve::worker
