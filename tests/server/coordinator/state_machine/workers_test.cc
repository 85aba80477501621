// Joining, ranks, leases and losses.
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(WorkersTest, RanksFollowTheOrderOfJoining) {
  TestCluster cluster;
  for (int i = 0; i < 4; ++i) {
    const Commands commands = cluster.Join("w" + std::to_string(i));
    const auto assigned = First<AssignRank>(commands);
    ASSERT_TRUE(assigned);
    EXPECT_EQ(assigned->rank, i);
    EXPECT_THAT(assigned->placement.first_expert, ElementsAre(0, 16, 32, 48, 64));
  }
}

TEST(WorkersTest, HeldRankIsGivenBackToItsHolder) {
  TestCluster cluster;
  cluster.Join("w0");
  const Commands commands = cluster.Join("w1", {.held_rank = 3, .held_num_ranks = 4});
  EXPECT_EQ(First<AssignRank>(commands)->rank, 3);
}

TEST(WorkersTest, HeldRankOfAnotherPlacementCountsForNothing) {
  TestCluster cluster;
  const Commands commands = cluster.Join("w0", {.held_rank = 3, .held_num_ranks = 8});
  EXPECT_EQ(First<AssignRank>(commands)->rank, 0);
}

TEST(WorkersTest, SurplusWorkerStandsByAndIsPromotedWhenARankIsFree) {
  TestCluster cluster;
  cluster.Serve();
  const Commands joined = cluster.Join("w4");
  EXPECT_TRUE(Has<SendStandby>(joined));
  EXPECT_FALSE(Has<AssignRank>(joined));
  const Commands lost = cluster.Do(StreamClosed{cluster.stream(2)});
  const auto assigned = First<AssignRank>(lost);
  ASSERT_TRUE(assigned);
  EXPECT_EQ(assigned->stream, cluster.stream(4));
  EXPECT_EQ(assigned->rank, 2);
}

TEST(WorkersTest, LoadedForAnotherRankIsIgnored) {
  TestCluster cluster;
  cluster.Join("w0");
  cluster.Load(0, 1);
  EXPECT_EQ(cluster.snapshot().workers[0].state, WorkerState::kLoading);
  EXPECT_EQ(cluster.snapshot().stale_messages, 1u);
}

TEST(WorkersTest, LoadProgressShowsInTheSnapshot) {
  TestCluster cluster;
  cluster.Join("w0");
  cluster.Do(WorkerLoadProgress{cluster.stream(0), 30, 120});
  EXPECT_EQ(cluster.snapshot().workers[0].loaded_bytes, 30u);
  EXPECT_EQ(cluster.snapshot().workers[0].total_bytes, 120u);
}

TEST(WorkersTest, HelloWithoutIdentityIsRejected) {
  TestCluster cluster;
  const Commands commands = cluster.Do(WorkerHello{1, "", "x"});
  EXPECT_EQ(First<RejectWorker>(commands)->code, absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(cluster.snapshot().workers.empty());
}

TEST(WorkersTest, HelloOfAnotherBackendIsRejectedNamingBoth) {
  TestCluster cluster;
  cluster.Do(WorkerHello{.stream = 1, .worker_id = "w0", .incarnation = "a", .backend = "cuda"});
  const auto rejected = First<RejectWorker>(cluster.Do(
      WorkerHello{.stream = 2, .worker_id = "w1", .incarnation = "b", .backend = "host"}));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->stream, 2u);
  EXPECT_NE(rejected->message.find("w1 has backend host, which differs from worker w0's cuda"),
            std::string::npos)
      << rejected->message;
  // The only worker may come back with another one.
  EXPECT_FALSE(Has<RejectWorker>(cluster.Do(
      WorkerHello{.stream = 3, .worker_id = "w0", .incarnation = "a", .backend = "host"})));
}

TEST(WorkersTest, HelloWithAnImpossibleEpochIsRejected) {
  TestCluster cluster;
  const Commands commands = cluster.Join("w0", {.last_epoch = ~EpochId{0}});
  EXPECT_TRUE(Has<RejectWorker>(commands));
}

TEST(WorkersTest, HelloWithAnEpochOfTheFarFutureIsRejectedAndMovesNoEpoch) {
  TestCluster cluster;  // Two seconds after the start.
  const EpochId furthest = cluster.config.initial_epoch + 2 + (EpochId{1} << 31);
  const auto rejected = First<RejectWorker>(cluster.Join("w0", {.last_epoch = furthest + 1}));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->code, absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(rejected->message, HasSubstr("last_epoch"));
  cluster.JoinAndLoadAll();
  EXPECT_EQ(cluster.snapshot().epoch, cluster.config.initial_epoch);
}

TEST(WorkersTest, EpochsThatTheCoordinatorItselfBeganAreNeverTooFarAhead) {
  TestCluster cluster(TestConfig(1));
  const EpochId furthest = cluster.config.initial_epoch + 2 + (EpochId{1} << 31);
  EXPECT_FALSE(Has<RejectWorker>(cluster.Join("w0", {.last_epoch = furthest})));
  cluster.Load(0, 0);
  const EpochId begun = cluster.snapshot().epoch;
  EXPECT_EQ(begun, furthest + 1);
  EXPECT_FALSE(Has<RejectWorker>(cluster.Join("w0", {.last_epoch = begun})));
}

TEST(WorkersTest, NoticeOfALostWorkerTellsItsFieldsOneByOne) {
  TestCluster cluster;
  cluster.Serve();
  const Commands commands = cluster.Do(StreamClosed{cluster.stream(2)});
  const auto notice = First<Notice>(commands);
  ASSERT_TRUE(notice);
  EXPECT_EQ(notice->event, "worker_lost");
  ASSERT_EQ(notice->fields.size(), 3u);
  EXPECT_STREQ(notice->fields[0].key, "worker");
  EXPECT_EQ(std::get<std::string>(notice->fields[0].value), "w2");
  EXPECT_STREQ(notice->fields[1].key, "rank");
  EXPECT_EQ(std::get<std::int64_t>(notice->fields[1].value), 2);
  EXPECT_STREQ(notice->fields[2].key, "reason");
  EXPECT_EQ(std::get<std::string>(notice->fields[2].value), "its stream closed");
}

TEST(WorkersTest, SecondHelloOnAStreamIsIgnored) {
  TestCluster cluster;
  cluster.Join("w0");
  EXPECT_TRUE(cluster.Do(WorkerHello{cluster.stream(0), "w9", "w9#1"}).empty());
  EXPECT_EQ(cluster.snapshot().stale_messages, 1u);
}

TEST(WorkersTest, NewStreamOfAConnectedWorkerReplacesTheOld) {
  TestCluster cluster;
  cluster.Serve();
  const StreamId older = cluster.stream(1);
  const Commands commands =
      cluster.Join("w1", {.last_epoch = cluster.epoch, .held_rank = 1, .held_num_ranks = 4});
  EXPECT_EQ(First<CloseStream>(commands)->stream, older);
  EXPECT_EQ(First<AssignRank>(commands)->rank, 1);
  EXPECT_EQ(All<SendEpochEnded>(commands).size(), 3u);
  EXPECT_TRUE(cluster.Do(StreamClosed{older}).empty());
  EXPECT_EQ(cluster.snapshot().workers.size(), 4u);
}

TEST(WorkersTest, HeartbeatOfAMemberIsAnsweredByALease) {
  TestCluster cluster;
  cluster.Serve();
  const auto lease =
      First<GrantLease>(cluster.Do(Heartbeat{cluster.stream(0), cluster.epoch, 77, 5}));
  ASSERT_TRUE(lease);
  EXPECT_EQ(lease->echo_us, 77);
  EXPECT_EQ(lease->duration_us, cluster.config.lease_us);
  EXPECT_EQ(lease->epoch, cluster.epoch);
  EXPECT_EQ(cluster.snapshot().workers[0].resident_bytes, 5u);
}

TEST(WorkersTest, HeartbeatOfAnOldEpochGetsNoLeaseButKeepsTheWorker) {
  TestCluster cluster;
  cluster.Serve();
  cluster.now_us += 500'000;
  EXPECT_TRUE(cluster.Do(Heartbeat{cluster.stream(0), cluster.epoch - 1, 0, 0}).empty());
  EXPECT_EQ(cluster.snapshot().workers[0].last_heartbeat_us, cluster.now_us);
  EXPECT_EQ(cluster.snapshot().stale_messages, 1u);
}

TEST(WorkersTest, NoLeaseAfterTheEpochEnded) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Do(StreamClosed{cluster.stream(3)});
  EXPECT_TRUE(cluster.Do(Heartbeat{cluster.stream(0), cluster.epoch, 0, 0}).empty());
}

TEST(WorkersTest, SilentWorkerIsLostAfterOneLease) {
  TestCluster cluster;
  cluster.Serve();
  const std::vector<StreamId> others = {cluster.stream(0), cluster.stream(2), cluster.stream(3)};
  EXPECT_FALSE(Has<CloseStream>(cluster.Run(999'000, others)));
  const Commands commands = cluster.Run(2'000, others);
  const auto closed = First<CloseStream>(commands);
  ASSERT_TRUE(closed);
  EXPECT_EQ(closed->stream, cluster.stream(1));
  EXPECT_THAT(closed->reason, HasSubstr("no heartbeat for 1000 ms"));
  EXPECT_EQ(All<SendEpochEnded>(commands).size(), 3u);
}

TEST(WorkersTest, NobodyIsLostBecauseTheHostItselfStalled) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1'500'000);
  cluster.now_us += 5'000'000;  // The host slept through every deadline, then ticks.
  EXPECT_FALSE(Has<CloseStream>(cluster.Do(Tick{})));
  EXPECT_FALSE(Has<CloseStream>(cluster.Run(2'000'000)));
  EXPECT_EQ(cluster.snapshot().state, ClusterState::kServing);
}

TEST(WorkersTest, DeadWorkerIsNoticedSoonAfterAStallOfTheHost) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1'500'000);
  cluster.now_us += 5'000'000;
  cluster.Do(Tick{});
  EXPECT_TRUE(Has<CloseStream>(cluster.Sleep(250'000)));
}

TEST(WorkersTest, EpochWaitsForTheLeaseOfALostWorker) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Do(Heartbeat{cluster.stream(1), cluster.epoch, 0, 0});  // leased until now + 1 s
  const TimeUs leased_until_us = cluster.now_us + cluster.config.lease_us;
  cluster.Run(300'000, {cluster.stream(0), cluster.stream(2), cluster.stream(3)});
  cluster.Do(StreamClosed{cluster.stream(1)});
  cluster.QuiesceAll();
  cluster.Join("w4");
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Load(4, 1)));
  EXPECT_EQ(cluster.snapshot().waiting_for, "the lease of a lost worker to run out");
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Run(leased_until_us - 1 - cluster.now_us)));
  EXPECT_EQ(All<SendCreateHeap>(cluster.Sleep(1)).size(), 4u);
}

TEST(WorkersTest, EndOfTheLostWorkersProcessLiftsItsFence) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1);
  cluster.Do(StreamClosed{cluster.stream(1)});
  cluster.QuiesceAll();
  cluster.Join("w1", {.incarnation = "w1#2"});
  ASSERT_FALSE(Has<SendCreateHeap>(cluster.Load(1, 1)));
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Do(ProcessEnded{"w1", "w1#0"})));
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Do(ProcessEnded{"w2", "w1#1"})));
  EXPECT_EQ(All<SendCreateHeap>(cluster.Do(ProcessEnded{"w1", "w1#1"})).size(), 4u);
}

TEST(WorkersTest, WorkerWhoseProcessEndedBeforeItsStreamIsNotFenced) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1);
  EXPECT_TRUE(cluster.Do(ProcessEnded{"w1", "w1#1"}).empty());
  EXPECT_TRUE(cluster.snapshot().serving);  // What it said last is still to come.
  cluster.Do(StreamClosed{cluster.stream(1)});
  cluster.QuiesceAll();
  cluster.Join("w1", {.incarnation = "w1#2"});
  EXPECT_EQ(All<SendCreateHeap>(cluster.Load(1, 1)).size(), 4u);
}

TEST(WorkersTest, NewProcessReplacesOneThatEndedBeforeItsStreamDid) {
  TestCluster cluster;
  cluster.Serve();
  const StreamId old = cluster.stream(1);
  cluster.Do(ProcessEnded{"w1", "w1#1"});
  const Commands commands = cluster.Join("w1", {.incarnation = "w1#2"});
  EXPECT_EQ(First<CloseStream>(commands)->stream, old);
  EXPECT_EQ(cluster.snapshot().workers.size(), 4u);
}

TEST(WorkersTest, NewProcessOfTheLostWorkerDoesNotLiftItsFence) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1);
  cluster.Do(StreamClosed{cluster.stream(1)});
  cluster.QuiesceAll();
  cluster.Join("w1", {.incarnation = "w1#2"});
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Load(1, 1)));
}

TEST(WorkersTest, SecondProcessOfALivingWorkersNameIsTurnedAwayAndDisturbsNobody) {
  TestCluster cluster;
  cluster.Serve();
  const Commands commands = cluster.Join("w1", {.incarnation = "w1#2"});
  EXPECT_THAT(First<CloseStream>(commands)->reason, HasSubstr("w1"));
  EXPECT_TRUE(First<CloseStream>(commands)->turned_away);
  EXPECT_FALSE(Has<SendEpochEnded>(commands));
  EXPECT_EQ(cluster.snapshot().workers.size(), 4u);
  EXPECT_TRUE(cluster.snapshot().serving);
}

TEST(WorkersTest, NewConnectionOfTheSameProcessReplacesTheOldOne) {
  TestCluster cluster;
  cluster.Serve();
  const Commands commands = cluster.Join("w1", {.held_rank = 1, .held_num_ranks = 4});
  EXPECT_THAT(First<CloseStream>(commands)->reason, HasSubstr("replaced"));
  EXPECT_FALSE(First<CloseStream>(commands)->turned_away);
  EXPECT_TRUE(Has<SendEpochEnded>(commands));
}

TEST(WorkersTest, SameProcessComingBackLiftsItsFence) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1);
  cluster.Do(StreamClosed{cluster.stream(1)});
  cluster.QuiesceAll();
  cluster.Join("w1", {.last_epoch = cluster.epoch, .held_rank = 1, .held_num_ranks = 4});
  EXPECT_EQ(All<SendCreateHeap>(cluster.Load(1, 1)).size(), 4u);
}

TEST(WorkersTest, WorkerThatHadQuiescedLeavesNoFence) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Run(1);
  cluster.Do(EpochQuiesced{cluster.stream(1), cluster.epoch});
  cluster.QuiesceAll();  // A new epoch forms; w1 goes before it holds a lease there.
  cluster.epoch = cluster.snapshot().epoch;
  cluster.Do(StreamClosed{cluster.stream(1)});
  cluster.QuiesceAll();
  cluster.Join("w4");
  EXPECT_TRUE(Has<SendCreateHeap>(cluster.Load(4, 1)));
}

TEST(WorkersTest, FailureClosesTheStreamAndFreesTheRank) {
  TestCluster cluster;
  cluster.Join("w0");
  const Commands commands =
      cluster.Do(WorkerFailure{cluster.stream(0), absl::StatusCode::kDataLoss, "header too long"});
  EXPECT_THAT(First<CloseStream>(commands)->reason, HasSubstr("DATA_LOSS: header too long"));
  EXPECT_EQ(First<AssignRank>(cluster.Join("w1"))->rank, 0);
}

TEST(WorkersTest, MessagesOfUnknownStreamsChangeNothing) {
  TestCluster cluster;
  cluster.Serve();
  const std::vector<Event> events = {WorkerLoadProgress{9, 1, 2},
                                     WorkerLoaded{9, 0, 4, 0, 0},
                                     HeapCreated{9, cluster.epoch, "h"},
                                     PeersOpened{9, cluster.epoch},
                                     EpochQuiesced{9, cluster.epoch},
                                     Heartbeat{9, cluster.epoch, 0, 0},
                                     Counts{9, cluster.epoch, 1, {}, {}},
                                     PhaseDone{9, cluster.epoch, 1, Phase::kDispatch},
                                     BatchDone{9, cluster.epoch, 1},
                                     WorkerLeaving{9, ""},
                                     WorkerFailure{9, absl::StatusCode::kInternal, "x"}};
  for (const Event& event : events) EXPECT_TRUE(cluster.Do(event).empty()) << event.index();
  EXPECT_EQ(cluster.snapshot().stale_messages, events.size());
  EXPECT_TRUE(cluster.Do(StreamClosed{9}).empty());
}

// ---- a coordinator that starts afresh

TEST(FreshStartTest, WorkersThatNoEpochKnewNeedNoWait) {
  TestCluster cluster(TestConfig(), 0);
  EXPECT_EQ(All<SendCreateHeap>(cluster.JoinAndLoadAll()).size(), 4u);
}

TEST(FreshStartTest, OneWorkerOfAnEarlierEpochMakesItWaitOneLease) {
  TestCluster cluster(TestConfig(2), 0);
  cluster.Join("w0", {.last_epoch = 5000, .held_rank = 0, .held_num_ranks = 2});
  cluster.Join("w1");
  cluster.Load(0, 0);
  cluster.Run(cluster.config.lease_us - 1);
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Load(1, 1)));
  cluster.Sleep(1);  // The rank was kept until now for whoever holds its weights.
  EXPECT_EQ(First<SendCreateHeap>(cluster.Load(1, 1))->epoch, 5001u);
}

TEST(FreshStartTest, FirstEpochWaitsOneLeaseWhereClientsRegionsAreWritten) {
  Config config = TestConfig();
  config.client_regions = true;
  TestCluster cluster(config, 0);
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.JoinAndLoadAll()));
  EXPECT_FALSE(Has<SendCreateHeap>(cluster.Run(999'999)));
  EXPECT_EQ(All<SendCreateHeap>(cluster.Sleep(1)).size(), 4u);
}

TEST(FreshStartTest, WholeLastEpochBackNeedsNoWait) {
  TestCluster cluster(TestConfig(), 0);
  Commands commands;
  for (int i = 3; i >= 0; --i) {
    cluster.Join("w" + std::to_string(i),
                 {.last_epoch = 5000, .held_rank = i, .held_num_ranks = 4});
    commands = cluster.Load(i, i);
  }
  ASSERT_EQ(All<SendCreateHeap>(commands).size(), 4u);
  EXPECT_EQ(First<SendCreateHeap>(commands)->epoch, 5001u);
}

TEST(FreshStartTest, WorkersOfDifferentLastEpochsWait) {
  TestCluster cluster(TestConfig(), 0);
  Commands commands;
  for (int i = 0; i < 4; ++i) {
    const EpochId last = i == 2 ? 4999 : 5000;
    cluster.Join("w" + std::to_string(i),
                 {.last_epoch = last, .held_rank = i, .held_num_ranks = 4});
    commands = cluster.Load(i, i);
  }
  EXPECT_FALSE(Has<SendCreateHeap>(commands));
  EXPECT_EQ(First<SendCreateHeap>(cluster.Run(1'000'000))->epoch, 5001u);
}

TEST(FreshStartTest, RanksAreKeptForHoldersForOneLease) {
  TestCluster cluster(TestConfig(2), 0);
  EXPECT_TRUE(Has<SendStandby>(cluster.Join("spare")));
  cluster.Join("w0", {.last_epoch = 5000, .held_rank = 0, .held_num_ranks = 2});
  const auto assigned = First<AssignRank>(
      cluster.Join("w1", {.last_epoch = 5000, .held_rank = 1, .held_num_ranks = 2}));
  ASSERT_TRUE(assigned);
  EXPECT_EQ(assigned->stream, cluster.stream(1));
  EXPECT_EQ(assigned->rank, 1);
}

TEST(FreshStartTest, RanksGoToAnyoneAfterOneLease) {
  TestCluster cluster(TestConfig(2), 0);
  cluster.Join("w0");
  const auto assigned = First<AssignRank>(cluster.Run(1'000'000));
  ASSERT_TRUE(assigned);
  EXPECT_EQ(assigned->rank, 0);
}

TEST(FreshStartTest, EpochsGrowOverARestartOfTheCoordinator) {
  TestCluster before;
  before.Serve();
  Config config = TestConfig();
  config.initial_epoch = 7;  // The clock went back.
  TestCluster after(config);
  for (int i = 0; i < 4; ++i) {
    after.Join("w" + std::to_string(i),
               {.last_epoch = before.epoch, .held_rank = i, .held_num_ranks = 4});
    after.Load(i, i);
  }
  EXPECT_EQ(after.snapshot().epoch, before.epoch + 1);
}

}  // namespace
}  // namespace epserve::coordinator
