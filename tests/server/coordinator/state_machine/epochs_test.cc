// Forming, probing and ending an epoch.
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(EpochsTest, FormsInStepsThatWaitForEveryRank) {
  TestCluster cluster;
  const Commands created = cluster.JoinAndLoadAll();
  ASSERT_EQ(All<SendCreateHeap>(created).size(), 4u);
  const EpochId epoch = cluster.snapshot().epoch;
  EXPECT_EQ(epoch, 1000u);
  for (int i : {2, 0, 3}) {
    EXPECT_TRUE(cluster.Do(HeapCreated{cluster.stream(i), epoch, "h" + std::to_string(i)}).empty());
  }
  const auto open = All<SendOpenPeers>(cluster.Do(HeapCreated{cluster.stream(1), epoch, "h1"}));
  ASSERT_EQ(open.size(), 4u);
  EXPECT_THAT(open[2].handles, ElementsAre("h0", "h1", "h2", "h3"));
  for (int i : {3, 2, 1}) EXPECT_TRUE(cluster.Do(PeersOpened{cluster.stream(i), epoch}).empty());
  const Commands started = cluster.Do(PeersOpened{cluster.stream(0), epoch});
  EXPECT_EQ(All<SendEpochStarted>(started).size(), 4u);
  const auto probe = First<StartProbe>(started);
  ASSERT_TRUE(probe);
  EXPECT_EQ(probe->batch, 1u);
  EXPECT_EQ(probe->layer, 3);
  EXPECT_EQ(probe->num_tokens, 8);
  EXPECT_EQ(probe->shards[3].rows.begin, 6);
  EXPECT_LT(IndexOf<SendEpochStarted>(started), IndexOf<StartProbe>(started));
}

TEST(EpochsTest, ServesOnlyOnceTheProbeIsVerified) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  cluster.Form();
  EXPECT_FALSE(cluster.snapshot().serving);
  EXPECT_EQ(cluster.snapshot().state, ClusterState::kProbing);
  const Commands done = cluster.Finish(1);
  EXPECT_TRUE(Has<VerifyProbe>(done));
  EXPECT_FALSE(Has<SetServing>(done));
  const auto serving = First<SetServing>(cluster.Do(ProbeVerified{cluster.epoch, true, ""}));
  ASSERT_TRUE(serving);
  EXPECT_TRUE(serving->serving);
  EXPECT_EQ(serving->epoch, cluster.epoch);
  EXPECT_TRUE(cluster.snapshot().serving);
}

TEST(EpochsTest, ProbeVerdictBeforeTheProbeIsDoneIsIgnored) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  cluster.Form();
  EXPECT_TRUE(cluster.Do(ProbeVerified{cluster.epoch, true, ""}).empty());
  EXPECT_FALSE(cluster.snapshot().serving);
}

TEST(EpochsTest, WrongProbeEndsTheEpochAndTheNextWaitsForADoublingBackoff) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  for (const std::int64_t backoff_us : {1'000'000, 2'000'000, 4'000'000}) {
    cluster.Form();
    cluster.Finish(1);
    const Commands wrong = cluster.Do(ProbeVerified{cluster.epoch, false, "rank 2 off by 0.5"});
    EXPECT_EQ(All<SendEpochEnded>(wrong).size(), 4u);
    EXPECT_THAT(First<SendEpochEnded>(wrong)->reason, HasSubstr("rank 2 off by 0.5"));
    EXPECT_EQ(First<Notice>(wrong)->level, Notice::Level::kError);
    EXPECT_THAT(cluster.snapshot().last_epoch_end, HasSubstr("rank 2 off by 0.5"));
    EXPECT_FALSE(Has<SetServing>(wrong));
    EXPECT_FALSE(Has<SendCreateHeap>(cluster.QuiesceAll()));
    EXPECT_FALSE(Has<SendCreateHeap>(cluster.Run(backoff_us - 1)));
    EXPECT_EQ(First<SendCreateHeap>(cluster.Sleep(1))->epoch, cluster.epoch + 1);
  }
  cluster.FormAndProbe();
  EXPECT_TRUE(cluster.snapshot().serving);
  EXPECT_EQ(cluster.snapshot().last_epoch_end, "");
}

TEST(EpochsTest, ProbeThatFailsOnAWorkerEndsTheEpoch) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  cluster.Form();
  const Commands commands = cluster.Do(
      BatchDone{cluster.stream(2), cluster.epoch, 1, absl::StatusCode::kInternal, "no memory"});
  EXPECT_THAT(First<SendEpochEnded>(commands)->reason, HasSubstr("worker w2 (rank 2)"));
  EXPECT_TRUE(Has<DropBatch>(commands));
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.QuiesceAll()));
}

TEST(EpochsTest, NextEpochWaitsUntilEveryLiveWorkerQuiesced) {
  TestCluster cluster;
  cluster.Serve();
  const EpochId old = cluster.epoch;
  cluster.Do(EpochQuiesced{cluster.stream(1), old});  // Left by itself.
  EXPECT_FALSE(cluster.snapshot().serving);
  cluster.Do(EpochQuiesced{cluster.stream(0), old});
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Do(EpochQuiesced{cluster.stream(2), old})));
  const Commands commands = cluster.Do(EpochQuiesced{cluster.stream(3), old});
  ASSERT_EQ(All<SendCreateHeap>(commands).size(), 4u);
  EXPECT_EQ(First<SendCreateHeap>(commands)->epoch, old + 1);
}

TEST(EpochsTest, LossWhileFormingEndsTheEpochForTheOthers) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  const EpochId epoch = cluster.snapshot().epoch;
  cluster.Do(HeapCreated{cluster.stream(0), epoch, "h"});
  const Commands commands = cluster.Do(StreamClosed{cluster.stream(3)});
  EXPECT_EQ(All<SendEpochEnded>(commands).size(), 3u);
  EXPECT_FALSE(Has<SetServing>(commands));
}

TEST(EpochsTest, OldAndRepeatedMessagesChangeNothing) {
  TestCluster cluster;
  cluster.Serve();
  const EpochId old = cluster.epoch;
  cluster.Do(EpochQuiesced{cluster.stream(1), old});
  cluster.QuiesceAll();
  const EpochId epoch = cluster.snapshot().epoch;
  ASSERT_EQ(epoch, old + 1);
  cluster.Do(HeapCreated{cluster.stream(0), epoch, "first"});
  const std::uint64_t before = cluster.snapshot().stale_messages;
  const std::vector<Event> events = {HeapCreated{cluster.stream(1), old, "old"},
                                     HeapCreated{cluster.stream(0), epoch, "second"},
                                     PeersOpened{cluster.stream(0), epoch},
                                     EpochQuiesced{cluster.stream(1), old},
                                     ProbeVerified{old, true, ""},
                                     BatchDone{cluster.stream(0), old, 1},
                                     Heartbeat{cluster.stream(0), old, 0, 0}};
  for (const Event& event : events) EXPECT_TRUE(cluster.Do(event).empty()) << event.index();
  EXPECT_EQ(cluster.snapshot().stale_messages, before + events.size());
  Commands rest;
  for (int i = 1; i < 4; ++i) rest = cluster.Do(HeapCreated{cluster.stream(i), epoch, "h"});
  EXPECT_EQ(First<SendOpenPeers>(rest)->handles[0], "first");
}

TEST(EpochsTest, WorkerThatCreatesNoHeapIsNamedAndLost) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  const EpochId epoch = cluster.epoch = cluster.snapshot().epoch;
  for (int i : {0, 1, 3}) cluster.Do(HeapCreated{cluster.stream(i), epoch, "h"});
  const Commands commands = cluster.Run(30'000'000);
  EXPECT_EQ(First<CloseStream>(commands)->stream, cluster.stream(2));
  EXPECT_THAT(First<SendEpochEnded>(commands)->reason,
              HasSubstr("worker w2 (rank 2): it did not create its heap within 30000 ms"));
}

TEST(EpochsTest, WorkerThatOpensNoPeersIsNamedAndLost) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  const EpochId epoch = cluster.epoch = cluster.snapshot().epoch;
  for (int i = 0; i < 4; ++i) cluster.Do(HeapCreated{cluster.stream(i), epoch, "h"});
  for (int i : {0, 1, 2}) cluster.Do(PeersOpened{cluster.stream(i), epoch});
  const Commands commands = cluster.Run(30'000'000);
  EXPECT_EQ(First<CloseStream>(commands)->stream, cluster.stream(3));
  EXPECT_THAT(First<SendEpochEnded>(commands)->reason, HasSubstr("did not open its peers"));
}

TEST(EpochsTest, ProbeThatNeverEndsIsGivenUpNamingTheWorker) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  cluster.Form();
  cluster.Do(BatchDone{cluster.stream(0), cluster.epoch, 1});
  const Commands commands = cluster.Run(30'000'000);
  EXPECT_THAT(First<SendEpochEnded>(commands)->reason, HasSubstr("worker w1 (rank 1)"));
  EXPECT_THAT(First<SendEpochEnded>(commands)->reason,
              ::testing::Not(HasSubstr("worker w0 (rank 0)")));
}

TEST(EpochsTest, WorkerThatDoesNotQuiesceIsLost) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Do(EpochQuiesced{cluster.stream(0), cluster.epoch});
  for (int i : {1, 2}) cluster.Do(EpochQuiesced{cluster.stream(i), cluster.epoch});
  const Commands commands = cluster.Run(30'000'000);
  EXPECT_EQ(First<CloseStream>(commands)->stream, cluster.stream(3));
  EXPECT_THAT(First<CloseStream>(commands)->reason, HasSubstr("did not leave epoch 1000"));
}

TEST(EpochsTest, FailureToCreateAHeapBacksOff) {
  TestCluster cluster(TestConfig(1));
  cluster.JoinAndLoadAll();
  cluster.Do(WorkerFailure{cluster.stream(0), absl::StatusCode::kResourceExhausted, "shm full"});
  cluster.Join("w0", {.last_epoch = 1000, .held_rank = 0, .held_num_ranks = 1});
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Load(0, 0)));
  EXPECT_TRUE(Has<SendCreateHeap>(cluster.Run(1'000'000)));
}

TEST(EpochsTest, EpochsDoNotRunAheadOfTheClock) {
  Config config = TestConfig(1);
  config.epoch_pace_us = 1'000'000;
  TestCluster cluster(config, 1'000'000);
  cluster.JoinAndLoadAll();  // epoch 1000 at 1 s
  Commands commands;
  for (int i = 0; i < 20; ++i) {
    cluster.epoch = cluster.snapshot().epoch;
    commands = cluster.QuiesceAll();
    TestCluster::Append(&commands, cluster.Run(100'000));
  }
  EXPECT_EQ(cluster.snapshot().epoch, 1003u);  // 3 s after the start
}

TEST(EpochsTest, SurplusRanksWithoutExpertsStillFormAnEpoch) {
  Config config = TestConfig(4);
  config.num_experts = 2;
  TestCluster cluster(config);
  cluster.Serve();
  EXPECT_EQ(cluster.snapshot().workers[3].num_experts, 0);
  cluster.Do(StreamClosed{cluster.stream(3)});
  EXPECT_EQ(cluster.snapshot().experts_without_worker, 0);
}

}  // namespace
}  // namespace epserve::coordinator
