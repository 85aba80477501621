#include "client/command/spare_cores.h"

#include <gtest/gtest.h>

namespace epserve::client {
namespace {

TEST(DefaultBusyPollTest, LooksOnlyWhereTwoCoresRemain) {
  EXPECT_EQ(LookingThreads(4, 2), 13);
  EXPECT_GT(DefaultBusyPollUs(16, LookingThreads(4, 2) + 1), 0);
  EXPECT_EQ(DefaultBusyPollUs(15, LookingThreads(4, 2) + 1), 0);
  EXPECT_EQ(DefaultBusyPollUs(2, LookingThreads(1, 1) + 1), 0);
}

}  // namespace
}  // namespace epserve::client
