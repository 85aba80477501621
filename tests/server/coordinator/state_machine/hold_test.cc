// HoldBatches: nothing is in flight while clients' device memory is opened or closed.
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

constexpr TimeUs kHoldUs = 500'000;

Commands Hold(TestCluster& cluster) { return cluster.Do(HoldBatches{cluster.now_us + kHoldUs}); }

TEST(HoldTest, IdleClusterIsHeldAtOnceAndRequestsWaitUntilItIsReleased) {
  TestCluster cluster;
  cluster.Serve();
  const std::optional<BatchesHeld> held = First<BatchesHeld>(Hold(cluster));
  ASSERT_TRUE(held.has_value());
  EXPECT_FALSE(held->expired);
  EXPECT_FALSE(Has<StartBatch>(cluster.Request(1)));
  EXPECT_FALSE(Has<CompleteRequest>(cluster.Run(100'000)));
  EXPECT_TRUE(Has<StartBatch>(cluster.Do(ReleaseBatches{})));
}

TEST(HoldTest, BatchInFlightEndsBeforeTheHoldIsAnsweredAndNoneFollowsIt) {
  TestCluster cluster;
  cluster.Serve();
  const std::optional<StartBatch> running = First<StartBatch>(cluster.Request(1));
  ASSERT_TRUE(running.has_value());
  EXPECT_FALSE(Has<BatchesHeld>(Hold(cluster)));
  cluster.Request(2);
  const Commands ended = cluster.Finish(running->batch);
  EXPECT_TRUE(Has<FinishBatch>(ended));
  EXPECT_TRUE(Has<BatchesHeld>(ended));
  EXPECT_FALSE(Has<StartBatch>(ended));
}

TEST(HoldTest, HoldThatIsNotReleasedEndsByItselfAndSaysSo) {
  TestCluster cluster;
  cluster.Serve();
  Hold(cluster);
  cluster.Request(1);
  const Commands after = cluster.Run(kHoldUs + 1);
  const std::optional<BatchesHeld> ended = First<BatchesHeld>(after);
  ASSERT_TRUE(ended.has_value());
  EXPECT_TRUE(ended->expired);
  EXPECT_TRUE(Has<StartBatch>(after));
}

TEST(HoldTest, BatchThatDoesNotEndLetsTheHoldExpireUnanswered) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  Hold(cluster);
  const std::vector<BatchesHeld> answers = All<BatchesHeld>(cluster.Run(kHoldUs + 1));
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_TRUE(answers[0].expired);
}

TEST(HoldTest, AnotherHoldIsAnsweredAnewAndLastsFromThenOn) {
  TestCluster cluster;
  cluster.Serve();
  Hold(cluster);
  cluster.Run(kHoldUs - 1000);
  EXPECT_TRUE(Has<BatchesHeld>(Hold(cluster)));
  EXPECT_FALSE(Has<BatchesHeld>(cluster.Run(kHoldUs - 1000)));
  EXPECT_TRUE(Has<BatchesHeld>(cluster.Run(2000)));
}

TEST(HoldTest, LongHoldWaitsForABatchAndLastsNoLongerFromItsAnswerOnThanItMay) {
  TestCluster cluster;
  cluster.Serve();
  const std::optional<StartBatch> running = First<StartBatch>(cluster.Request(1));
  ASSERT_TRUE(running.has_value());
  cluster.Do(HoldBatches{cluster.now_us + 10 * kHoldUs, /*most_held_us=*/kHoldUs});
  cluster.Request(2);
  const Commands waited = cluster.Run(3 * kHoldUs);
  EXPECT_FALSE(Has<BatchesHeld>(waited));
  EXPECT_FALSE(Has<StartBatch>(waited));
  const std::optional<BatchesHeld> held = First<BatchesHeld>(cluster.Finish(running->batch));
  ASSERT_TRUE(held.has_value());
  EXPECT_FALSE(held->expired);
  EXPECT_FALSE(Has<BatchesHeld>(cluster.Run(kHoldUs - 1000)));
  const Commands after = cluster.Run(2000);
  const std::optional<BatchesHeld> ended = First<BatchesHeld>(after);
  ASSERT_TRUE(ended.has_value());
  EXPECT_TRUE(ended->expired);
  EXPECT_TRUE(Has<StartBatch>(after));
}

TEST(HoldTest, EpochThatEndsUnderAHoldAnswersIt) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  EXPECT_FALSE(Has<BatchesHeld>(Hold(cluster)));
  EXPECT_TRUE(Has<BatchesHeld>(cluster.Do(StreamClosed{cluster.stream(0)})));
}

}  // namespace
}  // namespace epserve::coordinator
