// Leaving in order: one worker, and the coordinator itself.
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::HasSubstr;

TEST(DrainWorkerTest, UnknownWorkerIsNotFound) {
  TestCluster cluster;
  const auto done = First<DrainWorkerDone>(cluster.Do(DrainWorker{"w9", 5}));
  ASSERT_TRUE(done);
  EXPECT_EQ(done->token, 5u);
  EXPECT_EQ(done->code, absl::StatusCode::kNotFound);
  EXPECT_THAT(done->message, HasSubstr("w9"));
}

TEST(DrainWorkerTest, AcceptedRequestsFinishBeforeTheWorkerIsSentAway) {
  TestCluster cluster;
  cluster.Serve();
  for (RequestId id = 1; id <= 3; ++id) cluster.Request(id);  // Two in flight, one queued.
  const Commands drain = cluster.Do(DrainWorker{"w1", 5});
  EXPECT_FALSE(First<SetServing>(drain)->serving);
  EXPECT_FALSE(Has<SendEpochEnded>(drain));
  EXPECT_EQ(First<CompleteRequest>(cluster.Request(4))->code, absl::StatusCode::kUnavailable);
  EXPECT_EQ(cluster.snapshot().state, ClusterState::kDraining);

  EXPECT_TRUE(Has<StartBatch>(cluster.Finish(2)));
  EXPECT_FALSE(Has<SendEpochEnded>(cluster.Finish(3)));
  const Commands last = cluster.Finish(4);
  EXPECT_TRUE(Has<FinishBatch>(last));
  EXPECT_EQ(All<SendEpochEnded>(last).size(), 4u);
  EXPECT_FALSE(Has<SetServing>(last));  // It was said before.
  EXPECT_FALSE(Has<SendShutdown>(last));

  const Commands quiet = cluster.Do(EpochQuiesced{cluster.stream(1), cluster.epoch});
  EXPECT_EQ(First<SendShutdown>(quiet)->stream, cluster.stream(1));
  EXPECT_FALSE(Has<DrainWorkerDone>(quiet));
  const auto done = First<DrainWorkerDone>(cluster.Do(StreamClosed{cluster.stream(1)}));
  ASSERT_TRUE(done);
  EXPECT_EQ(done->token, 5u);
  EXPECT_EQ(done->code, absl::StatusCode::kOk);
  EXPECT_EQ(cluster.snapshot().experts_without_worker, 16);
}

TEST(DrainWorkerTest, StandbyTakesTheRankOfADrainedWorker) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Join("w4");
  cluster.Do(DrainWorker{"w1", 5});
  const Commands quiet = cluster.Do(EpochQuiesced{cluster.stream(1), cluster.epoch});
  EXPECT_TRUE(Has<SendShutdown>(quiet));
  const auto assigned = First<AssignRank>(quiet);
  ASSERT_TRUE(assigned);
  EXPECT_EQ(assigned->stream, cluster.stream(4));
  EXPECT_EQ(assigned->rank, 1);
}

TEST(DrainWorkerTest, LeavingWorkerIsDrainedTheSameWay) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  EXPECT_FALSE(First<SetServing>(cluster.Do(WorkerLeaving{cluster.stream(0), ""}))->serving);
  EXPECT_EQ(All<SendEpochEnded>(cluster.Finish(2)).size(), 4u);
  EXPECT_TRUE(Has<SendShutdown>(cluster.Do(EpochQuiesced{cluster.stream(0), cluster.epoch})));
}

TEST(DrainWorkerTest, StandbyIsSentAwayAtOnce) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Join("w4");
  const Commands commands = cluster.Do(DrainWorker{"w4", 5});
  EXPECT_EQ(First<SendShutdown>(commands)->stream, cluster.stream(4));
  EXPECT_FALSE(Has<SetServing>(commands));
  EXPECT_TRUE(cluster.snapshot().serving);
}

TEST(DrainWorkerTest, WhileFormingTheEpochEndsAtOnce) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  EXPECT_EQ(All<SendEpochEnded>(cluster.Do(DrainWorker{"w1", 5})).size(), 4u);
}

TEST(DrainWorkerTest, SecondDrainOfTheSameWorkerIsAnsweredWithTheFirst) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Do(DrainWorker{"w1", 5});
  cluster.Do(DrainWorker{"w1", 6});
  EXPECT_EQ(All<DrainWorkerDone>(cluster.Do(StreamClosed{cluster.stream(1)})).size(), 2u);
}

TEST(DrainWorkerTest, BatchesThatTakeTooLongAreFailed) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  cluster.Do(DrainWorker{"w1", 5});
  const Commands commands = cluster.Run(10'000'000);
  EXPECT_EQ(First<CompleteRequest>(commands)->code, absl::StatusCode::kUnavailable);
  EXPECT_EQ(All<SendEpochEnded>(commands).size(), 4u);
}

TEST(DrainWorkerTest, WorkerThatDoesNotExitIsCutOff) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Do(DrainWorker{"w1", 5});
  cluster.Do(EpochQuiesced{cluster.stream(1), cluster.epoch});
  const Commands commands = cluster.Run(10'000'000);
  EXPECT_EQ(First<DrainWorkerDone>(commands)->code, absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(First<CloseStream>(commands)->stream, cluster.stream(1));
}

TEST(DrainClusterTest, IdleIsDoneAtOnce) {
  TestCluster cluster;
  cluster.Serve();
  const Commands commands = cluster.Do(DrainCluster{});
  EXPECT_FALSE(First<SetServing>(commands)->serving);
  EXPECT_TRUE(Has<ClusterDrained>(commands));
  EXPECT_FALSE(Has<SendShutdown>(commands));
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.QuiesceAll()));
}

TEST(DrainClusterTest, AcceptedRequestsFinishFirst) {
  Config config = TestConfig();
  config.batch_window_us = 1'000'000;
  TestCluster cluster(config);
  cluster.Serve();
  cluster.Request(1);
  const Commands drain = cluster.Do(DrainCluster{});
  EXPECT_TRUE(Has<StartBatch>(drain));  // No waiting for company any more.
  EXPECT_FALSE(Has<ClusterDrained>(drain));
  const auto refused = First<CompleteRequest>(cluster.Request(2));
  EXPECT_EQ(refused->code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(refused->message, HasSubstr("draining"));
  const Commands last = cluster.Finish(2);
  EXPECT_TRUE(Has<FinishBatch>(last));
  EXPECT_LT(IndexOf<FinishBatch>(last), IndexOf<ClusterDrained>(last));
}

TEST(DrainClusterTest, TimeoutFailsWhatIsLeft) {
  TestCluster cluster;
  cluster.Serve();
  for (RequestId id = 1; id <= 3; ++id) cluster.Request(id);
  cluster.Do(DrainCluster{});
  EXPECT_FALSE(Has<ClusterDrained>(cluster.Run(9'999'999)));
  const Commands commands = cluster.Run(1);
  EXPECT_EQ(All<CompleteRequest>(commands).size(), 3u);
  EXPECT_EQ(All<ClusterDrained>(commands).size(), 1u);
  EXPECT_FALSE(Has<ClusterDrained>(cluster.Run(20'000'000)));
}

TEST(DrainClusterTest, WorkerLostMeanwhileEndsTheDrain) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  cluster.Do(DrainCluster{});
  const Commands commands = cluster.Do(StreamClosed{cluster.stream(0)});
  EXPECT_EQ(First<CompleteRequest>(commands)->code, absl::StatusCode::kUnavailable);
  EXPECT_TRUE(Has<ClusterDrained>(commands));
}

TEST(DrainClusterTest, NotServingIsDoneAtOnce) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  const Commands commands = cluster.Do(DrainCluster{});
  EXPECT_TRUE(Has<ClusterDrained>(commands));
  EXPECT_EQ(All<SendEpochEnded>(commands).size(), 4u);
}

}  // namespace
}  // namespace epserve::coordinator
