// Two threads and one turn. No test depends on how long anything takes.
#include "server/worker/poll_turn.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <future>
#include <thread>

namespace epserve::worker {
namespace {

TEST(PollTurnTest, FirstHasTheTurnAndKeepsItWhileItStays) {
  PollTurn turn;
  ASSERT_TRUE(turn.Await());
  auto other = std::async(std::launch::async, [&] { return turn.Await(); });
  // Longer than an absence would have to be.
  EXPECT_EQ(other.wait_for(4 * PollTurn::kMostAway), std::future_status::timeout);
  turn.End();
  EXPECT_FALSE(other.get());
  EXPECT_FALSE(turn.Await());
}

TEST(PollTurnTest, LongAbsenceIsTakenOverAndItsReturnSaysSo) {
  PollTurn turn;
  ASSERT_TRUE(turn.Await());
  const std::uint64_t absence = turn.Leave();
  ASSERT_TRUE(std::async(std::launch::async, [&] { return turn.Await(); }).get());
  EXPECT_FALSE(turn.Return(absence));
}

TEST(PollTurnTest, AbsenceOfTheOneThatTookOverIsNotTakenForTheFirstOnes) {
  PollTurn turn;
  ASSERT_TRUE(turn.Await());
  const std::uint64_t first = turn.Leave();
  std::uint64_t second = 0;
  std::thread([&] {
    ASSERT_TRUE(turn.Await());
    second = turn.Leave();
  }).join();
  EXPECT_FALSE(turn.Return(first));
  EXPECT_TRUE(turn.Return(second));
}

TEST(PollTurnTest, LongAbsenceIsTakenOverByOneThatSleepsWithoutATimeout) {
  PollTurn turn(/*idle_looks=*/0);  // It sleeps so from the first look on.
  ASSERT_TRUE(turn.Await());
  auto other = std::async(std::launch::async, [&] { return turn.Await(); });
  ASSERT_EQ(other.wait_for(4 * PollTurn::kMostAway), std::future_status::timeout);
  const std::uint64_t absence = turn.Leave();
  EXPECT_TRUE(other.get());
  EXPECT_FALSE(turn.Return(absence));
}

// Absences of any length, some of which last until they are taken over. `value` is written by
// whoever has the turn, with nothing else to guard it.
TEST(PollTurnTest, AtMostOneHasTheTurnAndSeesWhatTheOtherDid) {
  constexpr int kAbsences = 20000;
  constexpr int kLongEvery = 5000;
  PollTurn turn;
  std::atomic<int> holders{0};
  std::atomic<int> takeovers{0};
  int value = 0;
  const auto run = [&] {
    while (turn.Await()) {
      const int taken = takeovers.fetch_add(1) + 1;
      EXPECT_EQ(holders.fetch_add(1), 0);
      for (bool mine = true; mine;) {
        ++value;
        if (value > kAbsences) {
          holders.fetch_sub(1);
          turn.End();
          return;
        }
        const bool is_long = value % kLongEvery == 0;
        holders.fetch_sub(1);
        const std::uint64_t absence = turn.Leave();
        while (is_long && takeovers.load() == taken) std::this_thread::yield();
        mine = turn.Return(absence);
        EXPECT_FALSE(mine && is_long);
        if (mine) {
          EXPECT_EQ(holders.fetch_add(1), 0);
        }
      }
    }
  };
  std::array<std::thread, 2> threads;
  for (std::thread& thread : threads) thread = std::thread(run);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(value, kAbsences + 1);
  EXPECT_GE(takeovers.load(), kAbsences / kLongEvery);
}

}  // namespace
}  // namespace epserve::worker
