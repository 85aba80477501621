#include "server/worker/session_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace epserve::worker {
namespace {

using enum SessionAction;
using testing::ElementsAre;
using testing::IsEmpty;

Assignment Rank(int rank) { return {.rank = rank, .placement = runtime::EvenPlacement(8, 2)}; }

// Connected, with rank 1's weights loaded.
SessionState Loaded() {
  SessionState state;
  state.OnStreamOpened();
  state.OnAssignment(Rank(1));
  state.OnLoaded();
  return state;
}

SessionState Serving(std::uint64_t epoch) {
  SessionState state = Loaded();
  state.OnCreateHeap(epoch);
  state.OnOpenPeers(epoch);
  state.OnEpochStarted(epoch);
  return state;
}

TEST(SessionStateTest, WholeLifeGivesTheActionsInOrder) {
  SessionState state;
  EXPECT_THAT(state.OnStreamOpened(), IsEmpty());
  EXPECT_THAT(state.OnAssignment(Rank(1)), ElementsAre(kStartLoad));
  EXPECT_EQ(state.phase(), SessionPhase::kLoading);
  EXPECT_THAT(state.OnLoaded(), ElementsAre(kSendLoaded));
  EXPECT_THAT(state.OnCreateHeap(5), ElementsAre(kCreateHeap));
  EXPECT_THAT(state.OnOpenPeers(5), ElementsAre(kOpenPeers));
  EXPECT_THAT(state.OnEpochStarted(5), ElementsAre(kStartEpoch));
  EXPECT_EQ(state.phase(), SessionPhase::kServing);
  EXPECT_EQ(state.epoch(), 5u);
  EXPECT_THAT(state.OnEpochEnded(5), ElementsAre(kEndEpoch, kSendQuiesced));
  EXPECT_EQ(state.quiesced_epoch(), 5u);
  EXPECT_EQ(state.epoch(), 0u);
  EXPECT_EQ(state.phase(), SessionPhase::kLoaded);
  EXPECT_THAT(state.OnCreateHeap(6), ElementsAre(kCreateHeap));
}

TEST(SessionStateTest, SettledFromStandbyOrLoadedOnUntilTheStreamIsLost) {
  SessionState state;
  EXPECT_FALSE(state.settled());
  state.OnStreamOpened();
  EXPECT_FALSE(state.settled());
  state.OnStandby();
  EXPECT_TRUE(state.settled());
  state.OnAssignment(Rank(1));
  EXPECT_FALSE(state.settled());
  state.OnLoaded();
  EXPECT_TRUE(state.settled());
  EXPECT_TRUE(Serving(5).settled());
  state.OnStreamLost();
  EXPECT_FALSE(state.settled());
}

TEST(SessionStateTest, EventsOfAnotherEpochChangeNothing) {
  SessionState state = Serving(5);
  for (const std::uint64_t old : {0, 1, 4}) {
    EXPECT_THAT(state.OnCreateHeap(old), IsEmpty());
    EXPECT_THAT(state.OnOpenPeers(old), IsEmpty());
    EXPECT_THAT(state.OnEpochStarted(old), IsEmpty());
    EXPECT_THAT(state.OnEpochEnded(old), IsEmpty());
    EXPECT_THAT(state.OnLeaseExpired(old), IsEmpty());
    EXPECT_THAT(state.OnEpochFailed(old), IsEmpty());
  }
  EXPECT_EQ(state.phase(), SessionPhase::kServing);
  EXPECT_EQ(state.epoch(), 5u);
}

TEST(SessionStateTest, RepeatedStepsOfTheSameEpochChangeNothing) {
  SessionState state = Serving(5);
  EXPECT_THAT(state.OnCreateHeap(5), IsEmpty());
  EXPECT_THAT(state.OnOpenPeers(5), IsEmpty());
  EXPECT_THAT(state.OnEpochStarted(5), IsEmpty());
}

TEST(SessionStateTest, EpochIsNotEnteredOnceItWasDeclaredEnded) {
  SessionState state = Loaded();
  EXPECT_THAT(state.OnEpochEnded(9), ElementsAre(kSendQuiesced));
  EXPECT_THAT(state.OnCreateHeap(9), IsEmpty());
  EXPECT_THAT(state.OnCreateHeap(10), ElementsAre(kCreateHeap));
}

TEST(SessionStateTest, NewerEpochEndsThePresentOneFirst) {
  SessionState state = Serving(5);
  EXPECT_THAT(state.OnCreateHeap(6), ElementsAre(kEndEpoch, kCreateHeap));
  EXPECT_EQ(state.epoch(), 6u);
}

TEST(SessionStateTest, LostStreamEndsTheEpochAndKeepsTheWeights) {
  SessionState state = Serving(5);
  EXPECT_THAT(state.OnStreamLost(), ElementsAre(kEndEpoch));
  EXPECT_EQ(state.phase(), SessionPhase::kDisconnected);
  ASSERT_TRUE(state.held().has_value());
  EXPECT_EQ(state.held()->rank, 1);
  EXPECT_EQ(state.last_epoch(), 5u);
  state.OnStreamOpened();
  EXPECT_THAT(state.OnAssignment(Rank(1)), ElementsAre(kSendLoaded));
}

TEST(SessionStateTest, AssignmentOfAnotherRankLoadsAgain) {
  SessionState state = Serving(5);
  EXPECT_THAT(state.OnAssignment(Rank(0)), ElementsAre(kEndEpoch, kStartLoad));
  EXPECT_FALSE(state.held().has_value());
  EXPECT_THAT(state.OnLoaded(), ElementsAre(kSendLoaded));
  EXPECT_EQ(state.held()->rank, 0);
}

TEST(SessionStateTest, AssignmentDuringALoadOfAnotherRankLoadsItNext) {
  SessionState state;
  state.OnStreamOpened();
  state.OnAssignment(Rank(0));
  state.OnStreamLost();
  state.OnStreamOpened();
  EXPECT_THAT(state.OnAssignment(Rank(1)), IsEmpty());
  EXPECT_THAT(state.OnLoaded(), ElementsAre(kStartLoad));
  EXPECT_THAT(state.OnLoaded(), ElementsAre(kSendLoaded));
  EXPECT_EQ(state.held()->rank, 1);
}

TEST(SessionStateTest, LoadThatEndsWithoutAStreamIsHeldForTheNext) {
  SessionState state;
  state.OnStreamOpened();
  state.OnAssignment(Rank(0));
  state.OnStreamLost();
  EXPECT_THAT(state.OnLoaded(), IsEmpty());
  ASSERT_TRUE(state.held().has_value());
  state.OnStreamOpened();
  EXPECT_THAT(state.OnAssignment(Rank(0)), ElementsAre(kSendLoaded));
}

TEST(SessionStateTest, CreateHeapBeforeTheWeightsAreLoadedIsIgnored) {
  SessionState state;
  state.OnStreamOpened();
  EXPECT_THAT(state.OnCreateHeap(5), IsEmpty());
  state.OnAssignment(Rank(1));
  EXPECT_THAT(state.OnCreateHeap(5), IsEmpty());
}

TEST(SessionStateTest, EpochThatEndsWhileFormingIsQuiescedToo) {
  SessionState state = Loaded();
  state.OnCreateHeap(5);
  EXPECT_THAT(state.OnEpochEnded(5), ElementsAre(kEndEpoch, kSendQuiesced));
  EXPECT_THAT(state.OnOpenPeers(5), IsEmpty());
}

TEST(SessionStateTest, ExpiredLeaseLeavesTheEpochAndStaysConnected) {
  SessionState state = Serving(5);
  EXPECT_THAT(state.OnLeaseExpired(5), ElementsAre(kEndEpoch, kSendQuiesced));
  EXPECT_EQ(state.phase(), SessionPhase::kLoaded);
  EXPECT_THAT(state.OnLeaseExpired(5), IsEmpty());
}

TEST(SessionStateTest, FailedEpochDropsTheStream) {
  SessionState state = Loaded();
  state.OnCreateHeap(5);
  EXPECT_THAT(state.OnEpochFailed(5), ElementsAre(kEndEpoch, kDropStream));
}

TEST(SessionStateTest, NothingHappensWithoutAStream) {
  SessionState state;
  EXPECT_THAT(state.OnAssignment(Rank(0)), IsEmpty());
  EXPECT_THAT(state.OnCreateHeap(5), IsEmpty());
  EXPECT_THAT(state.OnEpochEnded(5), IsEmpty());
}

TEST(SessionStateTest, StandbyWaitsForAnAssignment) {
  SessionState state;
  state.OnStreamOpened();
  EXPECT_THAT(state.OnStandby(), IsEmpty());
  EXPECT_EQ(state.phase(), SessionPhase::kStandby);
  EXPECT_THAT(state.OnAssignment(Rank(0)), ElementsAre(kStartLoad));
}

}  // namespace
}  // namespace epserve::worker
