#include "server/common/busy_poll.h"

#include <grpcpp/alarm.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <ctime>
#include <thread>

#include "tests/support/asleep.h"

namespace epserve::server {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;
using NextStatus = grpc::CompletionQueue::NextStatus;

// A thread that waits for one event of a queue, after others of which the last took `last_wait`.
class BusyPollTest : public testing::Test {
 protected:
  ~BusyPollTest() override {
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  void Wait(microseconds busy, milliseconds last_wait = milliseconds(0),
            int num_waits = BusyPoll::kShortWaits) {
    waiter_ = std::thread([this, busy, last_wait, num_waits] {
      BusyPoll poll(busy);
      for (int i = 1; i < num_waits; ++i) {
        EXPECT_EQ(NextOf(poll, milliseconds(0)), NextStatus::GOT_EVENT);
      }
      EXPECT_EQ(NextOf(poll, last_wait), NextStatus::GOT_EVENT);
      thread_id_ = static_cast<pid_t>(::syscall(SYS_gettid));
      void* tag = nullptr;
      bool ok = false;
      status_ = poll.Next(&queue_, kNoDeadline, &tag, &ok);
    });
    while (thread_id_ == 0) std::this_thread::yield();
  }
  // Waits for an event that comes after `delay`.
  NextStatus NextOf(BusyPoll& poll, milliseconds delay) {
    void* tag = nullptr;
    bool ok = false;
    grpc::Alarm alarm;
    alarm.Set(&queue_, std::chrono::system_clock::now() + delay, this);
    return poll.Next(&queue_, kNoDeadline, &tag, &ok);
  }
  // Whether the waiter takes so much processor time before it sleeps.
  bool Takes(milliseconds wanted) {
    clockid_t clock;
    EXPECT_EQ(pthread_getcpuclockid(waiter_.native_handle(), &clock), 0);
    for (;;) {
      timespec used{};
      clock_gettime(clock, &used);
      if (seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec) >= wanted) return true;
      if (IsAsleep(thread_id_)) return false;
      std::this_thread::yield();
    }
  }
  NextStatus Event() {
    alarm_.Set(&queue_, std::chrono::system_clock::now(), this);
    waiter_.join();
    return status_;
  }

  grpc::CompletionQueue queue_;
  grpc::Alarm alarm_;
  std::thread waiter_;
  std::atomic<pid_t> thread_id_{0};
  NextStatus status_ = NextStatus::TIMEOUT;
};

TEST_F(BusyPollTest, WaitWithoutItSleeps) {
  Wait(microseconds(0));
  EXPECT_FALSE(Takes(milliseconds(100)));
  EXPECT_EQ(Event(), NextStatus::GOT_EVENT);
}

TEST_F(BusyPollTest, WaitAfterShortOnesLooksAndTakesTheEvent) {
  Wait(seconds(60));
  EXPECT_TRUE(Takes(milliseconds(100)));
  EXPECT_EQ(Event(), NextStatus::GOT_EVENT);
}

TEST_F(BusyPollTest, WaitAfterALongOneSleeps) {
  Wait(milliseconds(300), /*last_wait=*/milliseconds(400));
  EXPECT_FALSE(Takes(milliseconds(100)));
  EXPECT_EQ(Event(), NextStatus::GOT_EVENT);
}

TEST_F(BusyPollTest, WaitAfterFewShortOnesSleeps) {
  Wait(milliseconds(300), milliseconds(0), BusyPoll::kShortWaits - 1);
  EXPECT_FALSE(Takes(milliseconds(100)));
  EXPECT_EQ(Event(), NextStatus::GOT_EVENT);
}

TEST_F(BusyPollTest, WaitSleepsOnceItHasLookedForLongEnough) {
  Wait(milliseconds(2));
  EXPECT_FALSE(Takes(milliseconds(100)));
  EXPECT_EQ(Event(), NextStatus::GOT_EVENT);
}

TEST_F(BusyPollTest, DeadlineEndsTheLookingAndTheWaitGoesOn) {
  void* tag = nullptr;
  bool ok = false;
  BusyPoll poll(seconds(60));
  for (int i = 0; i < BusyPoll::kShortWaits; ++i) {
    EXPECT_EQ(NextOf(poll, milliseconds(0)), NextStatus::GOT_EVENT);
  }
  const auto begin = steady_clock::now();
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(poll.Next(&queue_, std::chrono::system_clock::now() + milliseconds(20), &tag, &ok),
              NextStatus::TIMEOUT);
  }
  EXPECT_GE(steady_clock::now() - begin, milliseconds(38));
  EXPECT_LT(steady_clock::now() - begin, seconds(50));
  EXPECT_EQ(NextOf(poll, milliseconds(0)), NextStatus::GOT_EVENT);
}

}  // namespace
}  // namespace epserve::server
