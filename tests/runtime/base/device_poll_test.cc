#include "runtime/base/device_poll.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>

#include <thread>

namespace epserve::runtime {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

TEST(DevicePollTest, ShortWaitIsSpentLookingAndALongOneAsleep) {
  std::thread waiter([] {
    const int slack_before = ::prctl(PR_GET_TIMERSLACK);
    const DevicePoll poll;
    int short_looks = 0;
    for (; poll.waited() < microseconds(300); poll.Pause()) ++short_looks;
    EXPECT_EQ(::prctl(PR_GET_TIMERSLACK), slack_before) << "it slept";
    while (poll.waited() < microseconds(3000)) poll.Pause();
    const auto start = steady_clock::now();
    poll.Pause();
    EXPECT_GE(steady_clock::now() - start, microseconds(200));
    EXPECT_EQ(::prctl(PR_GET_TIMERSLACK), 1000);
    EXPECT_GT(short_looks, 0);
  });
  waiter.join();
}

}  // namespace
}  // namespace epserve::runtime
