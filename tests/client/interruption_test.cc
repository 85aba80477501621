#include "client/command/interruption.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>

namespace epserve::client {
namespace {

using testing::ExitedWithCode;
using testing::KilledBySignal;

constexpr unsigned kPatienceS = 60;  // Only a failing test waits that long.

// Waits for a signal to end the process; if none does it ends by SIGALRM.
[[noreturn]] void AwaitEnd() {
  alarm(kPatienceS);
  while (true) pause();
}

void Say(const char* text) {
  std::fputs(text, stderr);
  std::fflush(stderr);
}

class InterruptionTest : public testing::TestWithParam<int> {
 protected:
  InterruptionTest() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_P(InterruptionTest, SignalRunsTheCleanupAndThenEndsTheProcess) {
  EXPECT_EXIT(
      {
        const auto interruption = Interruption::Create().value();
        interruption->SetCleanup([] { Say("cleaned up"); });
        kill(getpid(), GetParam());
        AwaitEnd();
      },
      KilledBySignal(GetParam()), "^cleaned up$");
}

TEST_P(InterruptionTest, SecondSignalDoesNotCutTheCleanupShort) {
  EXPECT_EXIT(
      {
        const auto interruption = Interruption::Create().value();
        interruption->SetCleanup([] {
          for (const int signal_number : {SIGINT, SIGTERM, SIGHUP}) kill(getpid(), signal_number);
          Say("cleaned up");
        });
        kill(getpid(), GetParam());
        AwaitEnd();
      },
      KilledBySignal(GetParam()), "^cleaned up$");
}

INSTANTIATE_TEST_SUITE_P(Signals, InterruptionTest, testing::Values(SIGINT, SIGTERM, SIGHUP));

TEST_F(InterruptionTest, CleanupThatWasTakenBackDoesNotRun) {
  EXPECT_EXIT(
      {
        const auto interruption = Interruption::Create().value();
        interruption->SetCleanup([] { Say("cleaned up"); });
        interruption->SetCleanup(nullptr);
        kill(getpid(), SIGTERM);
        AwaitEnd();
      },
      KilledBySignal(SIGTERM), "^$");
}

TEST_F(InterruptionTest, SignalThatIsIgnoredStaysIgnored) {
  EXPECT_EXIT(
      {
        signal(SIGHUP, SIG_IGN);
        const auto interruption = Interruption::Create().value();
        interruption->SetCleanup([] { Say("cleaned up"); });
        kill(getpid(), SIGHUP);
        kill(getpid(), SIGTERM);
        AwaitEnd();
      },
      KilledBySignal(SIGTERM), "^cleaned up$");
}

TEST_F(InterruptionTest, SignalsEndTheProcessAsBeforeOnceItIsGone) {
  EXPECT_EXIT(
      {
        Interruption::Create().value()->SetCleanup([] { Say("cleaned up"); });
        raise(SIGTERM);
        _exit(3);
      },
      KilledBySignal(SIGTERM), "^$");
}

TEST_F(InterruptionTest, WithoutASignalNothingHappens) {
  EXPECT_EXIT(
      {
        Interruption::Create().value()->SetCleanup([] { Say("cleaned up"); });
        _exit(3);
      },
      ExitedWithCode(3), "^$");
}

}  // namespace
}  // namespace epserve::client
