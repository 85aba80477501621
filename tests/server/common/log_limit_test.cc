#include "server/common/log_limit.h"

#include <gtest/gtest.h>

namespace epserve::server {
namespace {

TEST(LogLimitTest, EachKeyIsLetThroughOnceAPeriod) {
  LogLimit limit;
  LogLimit::TimePoint now;
  EXPECT_TRUE(limit.Allows("a", now));
  EXPECT_FALSE(limit.Allows("a", now + LogLimit::kPeriod / 2));
  EXPECT_TRUE(limit.Allows("b", now));
  EXPECT_TRUE(limit.Allows("a", now + LogLimit::kPeriod));
}

TEST(LogLimitTest, MoreKeysThanItKeepsAreNotLetThroughUntilOldOnesLapse) {
  LogLimit limit;
  LogLimit::TimePoint now;
  for (std::size_t i = 0; i < LogLimit::kMaxKeys; ++i) {
    ASSERT_TRUE(limit.Allows(std::to_string(i), now));
  }
  EXPECT_FALSE(limit.Allows("one more", now));
  EXPECT_TRUE(limit.Allows("one more", now + LogLimit::kPeriod));
}

}  // namespace
}  // namespace epserve::server
