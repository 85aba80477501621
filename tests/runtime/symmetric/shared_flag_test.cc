#include "runtime/symmetric/shared_flag.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <iterator>
#include <thread>
#include <vector>

#include "tests/support/asleep.h"

namespace epserve::runtime {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Has futex_waitv fail with `error` for the calling thread from now on, as a sandbox does.
bool RefuseFutexWaitv(int error) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex_waitv, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {static_cast<unsigned short>(std::size(filter)), filter};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

long SleepsOfThisThread() {
  rusage usage{};
  EXPECT_EQ(::getrusage(RUSAGE_THREAD, &usage), 0);
  return usage.ru_nvcsw;
}

class SharedFlagTest : public testing::Test {
 protected:
  WaitLimits Limits(milliseconds timeout) const { return {steady_clock::now() + timeout, &abort_}; }

  SharedFlag flag_;
  std::atomic<std::uint32_t> abort_{0};
};

TEST_F(SharedFlagTest, ReachedFlagIsSeenAtOnceEvenPastTheDeadlineAndAfterAnAbort) {
  Publish(&flag_, 5);
  abort_.store(1);
  EXPECT_EQ(WaitForValue(&flag_, 5, Limits(milliseconds(-1))), WaitResult::kReached);
  EXPECT_EQ(WaitForValue(&flag_, 4, Limits(milliseconds(-1))), WaitResult::kReached);
}

TEST_F(SharedFlagTest, FlagThatStaysLowTimesOutAtTheDeadline) {
  Publish(&flag_, 4);
  const auto begin = steady_clock::now();
  EXPECT_EQ(WaitForValue(&flag_, 5, Limits(milliseconds(30))), WaitResult::kTimedOut);
  EXPECT_GE(steady_clock::now() - begin, milliseconds(30));
  EXPECT_EQ(flag_.waiters.load(), 0u);
}

TEST_F(SharedFlagTest, BusyWaitTakesTheFlagOrTheAbortWithoutSleeping) {
  for (const WaitResult wanted : {WaitResult::kReached, WaitResult::kAborted}) {
    WaitLimits limits = Limits(milliseconds(60'000));
    limits.busy = limits.deadline - steady_clock::now();
    WaitResult result = WaitResult::kTimedOut;
    std::thread waiter([&] { result = WaitForValue(&flag_, 5, limits); });
    clockid_t clock;
    ASSERT_EQ(pthread_getcpuclockid(waiter.native_handle(), &clock), 0);
    // Until it has looked for longer than any wait does before it sleeps.
    for (timespec used{}; used.tv_sec == 0 && used.tv_nsec < 20'000'000;) {
      EXPECT_EQ(flag_.waiters.load(), 0u);
      if (flag_.waiters.load() != 0) break;
      std::this_thread::yield();
      clock_gettime(clock, &used);
    }
    if (wanted == WaitResult::kReached) {
      Publish(&flag_, 5);
    } else {
      abort_.store(1);
    }
    waiter.join();
    EXPECT_EQ(result, wanted);
    flag_.value.store(0);
  }
}

TEST_F(SharedFlagTest, AbortEndsASleepingWaitLongBeforeItsDeadline) {
  std::thread aborter([this] {
    while (flag_.waiters.load() == 0) std::this_thread::yield();  // It sleeps, or is about to.
    abort_.store(1);
  });
  const auto begin = steady_clock::now();
  EXPECT_EQ(WaitForValue(&flag_, 1, Limits(milliseconds(60'000))), WaitResult::kAborted);
  EXPECT_LT(steady_clock::now() - begin, milliseconds(10'000));
  aborter.join();
}

TEST_F(SharedFlagTest, ValuesWhoseLowHalfWrapsAreStillOrdered) {
  Publish(&flag_, 0xffffffffull);
  std::thread publisher([this] {
    while (flag_.waiters.load() == 0) std::this_thread::yield();
    Publish(&flag_, 0x100000000ull);
  });
  EXPECT_EQ(WaitForValue(&flag_, 0x100000000ull, Limits(milliseconds(60'000))),
            WaitResult::kReached);
  publisher.join();
}

// The slices of a wait would hide a publisher that wakes nobody, so this sleeper has none.
TEST_F(SharedFlagTest, PublishWakesASleeperInTheKernel) {
  flag_.waiters.store(1);
  std::atomic<bool> woken{false};
  std::atomic<pid_t> sleeper_id{0};
  std::thread sleeper([&] {
    sleeper_id.store(::gettid());
    timespec timeout{};
    timeout.tv_sec = 60;
    // 0: woken. EAGAIN: the value had changed before it fell asleep.
    const long result = ::syscall(SYS_futex, &flag_.value, FUTEX_WAIT, 0u, &timeout, nullptr, 0);
    woken.store(result == 0 || errno == EAGAIN);
  });
  while (!IsAsleep(sleeper_id.load())) std::this_thread::yield();
  Publish(&flag_, 1);
  sleeper.join();
  EXPECT_TRUE(woken.load());
}

TEST_F(SharedFlagTest, FirstOfSeveralFlagsEndsTheWaitWhicheverItIs) {
  SharedFlag flags[3];
  SharedFlag* const all[] = {&flags[0], &flags[1], &flags[2]};
  for (SharedFlag* const first : all) {
    for (SharedFlag& flag : flags) flag.value.store(4);
    std::thread publisher([first] {
      while (first->waiters.load() == 0) std::this_thread::yield();  // It sleeps, or is about to.
      Publish(first, 5);
    });
    EXPECT_EQ(WaitForAny(all, 5, Limits(milliseconds(60'000))), WaitResult::kReached);
    publisher.join();
    EXPECT_GE(first->value.load(), 5u);
    // One that is reached already is not waited for.
    EXPECT_EQ(WaitForAny(all, 5, Limits(milliseconds(-1))), WaitResult::kReached);
  }
  for (const SharedFlag& flag : flags) EXPECT_EQ(flag.waiters.load(), 0u);
}

TEST_F(SharedFlagTest, SeveralFlagsThatStayLowEndWithTheDeadlineOrTheAbort) {
  std::vector<SharedFlag> flags(kMostAwaitedFlags);
  std::vector<SharedFlag*> all;
  for (SharedFlag& flag : flags) all.push_back(&flag);
  const auto begin = steady_clock::now();
  EXPECT_EQ(WaitForAny(all, 1, Limits(milliseconds(30))), WaitResult::kTimedOut);
  EXPECT_GE(steady_clock::now() - begin, milliseconds(30));
  std::thread aborter([&] {
    while (flags.back().waiters.load() == 0) std::this_thread::yield();
    abort_.store(1);
  });
  EXPECT_EQ(WaitForAny(all, 1, Limits(milliseconds(60'000))), WaitResult::kAborted);
  aborter.join();
  for (const SharedFlag& flag : flags) EXPECT_EQ(flag.waiters.load(), 0u);
}

// Each slice of a wait would look at all flags, so that a waiter which none but the first one's
// publisher wakes takes a slice a round, 5 ms. Half the rounds may be as slow on a busy machine.
TEST_F(SharedFlagTest, EveryAwaitedFlagWakesItsSleeper) {
  constexpr std::uint64_t kRounds = 200;
  SharedFlag unused;
  SharedFlag there;
  SharedFlag back;
  std::thread other([&] {
    SharedFlag* const both[] = {&unused, &there};
    for (std::uint64_t round = 1; round <= kRounds; ++round) {
      EXPECT_EQ(WaitForAny(both, round, Limits(milliseconds(60'000))), WaitResult::kReached);
      Publish(&back, round);
    }
  });
  std::vector<std::chrono::nanoseconds> took;
  for (std::uint64_t round = 1; round <= kRounds; ++round) {
    while (there.waiters.load() == 0) std::this_thread::yield();
    const auto begin = steady_clock::now();
    Publish(&there, round);
    EXPECT_EQ(WaitForValue(&back, round, Limits(milliseconds(60'000))), WaitResult::kReached);
    took.push_back(steady_clock::now() - begin);
  }
  other.join();
  std::nth_element(took.begin(), took.begin() + kRounds / 2, took.end());
  EXPECT_LT(took[kRounds / 2], milliseconds(3)) << "it was not woken";
}

// A thread that spins gives up no core by itself, however many others want it.
TEST_F(SharedFlagTest, WaitForSeveralSleepsWhateverTheCallForThemIsRefusedWith) {
  SharedFlag flags[2];
  SharedFlag* const both[] = {&flags[0], &flags[1]};
  for (const int error : {ENOSYS, EPERM, EACCES, EINVAL}) {
    bool refused = false;
    WaitResult result = WaitResult::kReached;
    long sleeps = 0;
    std::thread waiter([&] {
      refused = RefuseFutexWaitv(error);
      const long before = SleepsOfThisThread();
      result = WaitForAny(both, 1, Limits(milliseconds(200)));
      sleeps = SleepsOfThisThread() - before;
    });
    waiter.join();
    if (!refused) GTEST_SKIP() << "this system lets no thread filter its system calls";
    EXPECT_EQ(result, WaitResult::kTimedOut);
    EXPECT_GE(sleeps, 2) << "error " << error;
  }
}

// Many more waiters than cores, each round waiting for all the others: a lost wake-up would cost
// every round a slice and then the deadline.
TEST_F(SharedFlagTest, ManyMoreThreadsThanCoresPassPayloadsInRounds) {
  constexpr int kThreads = 24;
  constexpr std::uint64_t kRounds = 50;
  std::vector<SharedFlag> flags(kThreads);
  std::vector<std::uint64_t> payload(kThreads, 0);  // Plain memory: the flags must order it.
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int self = 0; self < kThreads; ++self) {
    threads.emplace_back([&, self] {
      for (std::uint64_t round = 1; round <= kRounds; ++round) {
        if (round % 2 == 1) payload[self] = round * 100 + self;
        Publish(&flags[self], round);
        for (int other = 0; other < kThreads; ++other) {
          if (WaitForValue(&flags[other], round, Limits(milliseconds(60'000))) !=
              WaitResult::kReached) {
            ++failures;
            return;
          }
          // Written in odd rounds only, so that nobody writes while others still read.
          if (round % 2 == 1 && payload[other] != round * 100 + other) ++failures;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures.load(), 0);
}

}  // namespace
}  // namespace epserve::runtime
