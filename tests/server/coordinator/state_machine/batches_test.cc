// Batches: slots, shards, merging, counts, triggers and failures.
#include "server/coordinator/state_machine/batch.h"
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

Config Merging(std::int64_t window_us) {
  Config config = TestConfig();
  config.batch_window_us = window_us;
  config.queue_capacity = 100;
  return config;
}

Config Separate() {
  Config config = TestConfig();
  config.trigger = TriggerMode::kSeparate;
  return config;
}

std::vector<RequestId> Ids(const std::vector<RequestRows>& rows) {
  std::vector<RequestId> ids;
  for (const RequestRows& one : rows) ids.push_back(one.request);
  return ids;
}

TEST(BatchesTest, StartsAtOnceWithShardsByRank) {
  TestCluster cluster;
  cluster.Serve();
  const auto batch =
      First<StartBatch>(cluster.Request(1, 6, {.layer = 7, .row_type = RowType::kBf16}));
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch->batch, 2u);
  EXPECT_EQ(batch->epoch, cluster.epoch);
  EXPECT_EQ(batch->layer, 7);
  EXPECT_EQ(batch->row_type, RowType::kBf16);
  EXPECT_TRUE(batch->routed);
  EXPECT_EQ(batch->num_tokens, 6);
  ASSERT_EQ(batch->shards.size(), 4u);
  const std::vector<std::int64_t> begins = {0, 2, 4, 5};
  for (int r = 0; r < 4; ++r) {
    EXPECT_EQ(batch->shards[r].rank, r);
    EXPECT_EQ(batch->shards[r].stream, cluster.stream(r));
    EXPECT_EQ(batch->shards[r].rows.begin, begins[r]);
  }
  EXPECT_EQ(batch->shards[3].rows.end, 6);
}

TEST(BatchesTest, RanksWithoutRowsAreSentTheirShardsFirst) {
  const std::vector<ShardPlan> lone = {{0, 10, {0, 0}}, {1, 11, {0, 1}}, {2, 12, {1, 1}}};
  EXPECT_THAT(SendingOrder(lone), ElementsAre(0, 2, 1));
  const std::vector<ShardPlan> even = {{0, 10, {0, 2}}, {1, 11, {2, 3}}, {2, 12, {3, 4}}};
  EXPECT_THAT(SendingOrder(even), ElementsAre(0, 1, 2));
}

TEST(BatchesTest, SlotIsReusedOnlyAfterEveryRankIsDone) {
  TestCluster cluster;
  cluster.Serve();
  EXPECT_EQ(First<StartBatch>(cluster.Request(1))->slot, 0);
  EXPECT_EQ(First<StartBatch>(cluster.Request(2))->slot, 1);
  EXPECT_TRUE(cluster.Request(3).empty());
  for (int i : {0, 1, 3}) {
    EXPECT_TRUE(cluster.Do(BatchDone{cluster.stream(i), cluster.epoch, 3}).empty());
  }
  EXPECT_TRUE(cluster.Do(BatchDone{cluster.stream(0), cluster.epoch, 3}).empty());  // Repeated.
  const Commands commands = cluster.Do(BatchDone{cluster.stream(2), cluster.epoch, 3});
  EXPECT_THAT(Ids(First<FinishBatch>(commands)->requests), ElementsAre(2));
  const auto next = First<StartBatch>(commands);
  ASSERT_TRUE(next);
  EXPECT_EQ(next->slot, 1);
  EXPECT_EQ(next->batch, 4u);
}

TEST(BatchesTest, WithoutAWindowNothingIsMerged) {
  TestCluster cluster;
  cluster.Serve();
  for (RequestId id = 1; id <= 4; ++id) cluster.Request(id);
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Finish(2))->requests), ElementsAre(3));
}

TEST(BatchesTest, QueuedRequestsAreMergedOnceASlotIsFreeAndNoneWaitsForOthers) {
  Config config = TestConfig();
  config.merge_queued = true;
  TestCluster cluster(config);
  cluster.Serve();
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Request(1, 8))->requests), ElementsAre(1));
  cluster.Request(2, 8);
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Do(InputTaken{}))->requests), ElementsAre(2));
  cluster.Request(3, 8);
  cluster.Request(4, 8, {.layer = 4});
  cluster.Request(5, 8);
  EXPECT_FALSE(cluster.machine.WantsInputTaken()) << "there is no free slot";
  EXPECT_FALSE(Has<StartBatch>(cluster.Finish(2)));
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Do(InputTaken{}))->requests), ElementsAre(3, 5));
  EXPECT_FALSE(Has<StartBatch>(cluster.Finish(3)));
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Finish(4))->requests), ElementsAre(4))
      << "nothing is in flight any more";
}

TEST(BatchesTest, BesideABatchInFlightMergedRequestsWaitUntilAllInputIsTaken) {
  Config config = TestConfig();
  config.merge_queued = true;
  TestCluster cluster(config);
  cluster.Serve();
  EXPECT_FALSE(cluster.machine.WantsInputTaken());
  EXPECT_TRUE(Has<StartBatch>(cluster.Request(1, 8)));
  EXPECT_FALSE(cluster.machine.WantsInputTaken()) << "nothing is queued";
  EXPECT_TRUE(cluster.Do(InputTaken{}).empty());
  EXPECT_TRUE(cluster.Request(2, 8).empty());
  EXPECT_TRUE(cluster.Request(3, 8).empty()) << "what was told before them is over";
  EXPECT_TRUE(cluster.machine.WantsInputTaken());
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Do(InputTaken{}))->requests), ElementsAre(2, 3));
  EXPECT_FALSE(cluster.machine.WantsInputTaken());
}

TEST(BatchesTest, WhereInputIsToldTheFirstMergedBatchWaitsForThatButNotForLong) {
  Config config = TestConfig();
  config.merge_queued = true;
  config.input_is_told = true;
  TestCluster cluster(config);
  cluster.Serve();
  EXPECT_TRUE(cluster.Request(1, 8).empty());
  EXPECT_TRUE(cluster.machine.WantsInputTaken());
  EXPECT_TRUE(cluster.Request(2, 8).empty());
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Do(InputTaken{}))->requests), ElementsAre(1, 2));
  cluster.Finish(2);
  EXPECT_TRUE(cluster.Request(3, 8).empty());
  cluster.now_us += 1999;
  EXPECT_TRUE(cluster.Request(4, 8).empty());
  cluster.now_us += 1;
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Request(5, 8))->requests), ElementsAre(3, 4, 5));
}

TEST(BatchesTest, NoMergedBatchStartsBesideASmallOneOnCpus) {
  for (const std::string backend : {"host", "cuda"}) {
    for (const std::int64_t tokens : {64, 65}) {
      Config config = TestConfig();
      config.merge_queued = true;
      config.max_batch_tokens = 128;
      TestCluster cluster(config);
      cluster.ServeOn(backend);
      EXPECT_TRUE(Has<StartBatch>(cluster.Request(1, tokens)));
      EXPECT_TRUE(cluster.Request(2, 8).empty());
      const bool waits = backend == "host" && tokens == 64;
      EXPECT_EQ(cluster.machine.WantsInputTaken(), !waits) << backend << tokens;
      EXPECT_EQ(Has<StartBatch>(cluster.Do(InputTaken{})), !waits) << backend << tokens;
      EXPECT_EQ(Has<StartBatch>(cluster.Finish(2)), waits) << backend << tokens;
    }
  }
}

class MergingOnCpus : public TestCluster {
 public:
  MergingOnCpus() : TestCluster(MergeQueued()) { ServeOn("host"); }

 private:
  static Config MergeQueued() {
    Config config = TestConfig();
    config.merge_queued = true;
    return config;
  }
};

TEST(BatchesTest, MergedBatchStartsBesideASmallOneOfAnotherKind) {
  MergingOnCpus cluster;
  EXPECT_TRUE(Has<StartBatch>(cluster.Request(1)));
  RequestArrived other;
  other.row_type = RowType::kBf16;
  cluster.Request(2, 8, other);
  EXPECT_TRUE(Has<StartBatch>(cluster.Do(InputTaken{})));
}

TEST(BatchesTest, MergedBatchStartsBesideASmallOneThatWillTakeLong) {
  MergingOnCpus cluster;
  EXPECT_TRUE(Has<StartBatch>(cluster.Request(1)));
  cluster.Sleep(20'000);
  cluster.Finish(2);
  EXPECT_TRUE(Has<StartBatch>(cluster.Request(2)));
  cluster.Request(3);
  EXPECT_TRUE(Has<StartBatch>(cluster.Do(InputTaken{})));
}

TEST(BatchesTest, InputTakenIsNotWaitedForWithoutMergingOrWithAWindow) {
  TestCluster cluster;
  cluster.Serve();
  EXPECT_TRUE(Has<StartBatch>(cluster.Request(1)));
  EXPECT_TRUE(Has<StartBatch>(cluster.Request(2)));
  TestCluster windowed(Merging(200));
  windowed.Serve();
  windowed.Request(1, 8);
  EXPECT_TRUE(Has<StartBatch>(windowed.Sleep(200)));
  windowed.Request(2, 8);
  EXPECT_FALSE(windowed.machine.WantsInputTaken());
  EXPECT_TRUE(Has<StartBatch>(windowed.Sleep(200)));
}

TEST(BatchesTest, RequestsWithinTheWindowAreMerged) {
  TestCluster cluster(Merging(200));
  cluster.Serve();
  EXPECT_TRUE(cluster.Request(1, 8).empty());
  cluster.Sleep(100);
  EXPECT_TRUE(cluster.Request(2, 4).empty());
  const auto batch = First<StartBatch>(cluster.Sleep(100));
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch->num_tokens, 12);
  EXPECT_THAT(Ids(batch->requests), ElementsAre(1, 2));
  EXPECT_EQ(batch->requests[1].rows.begin, 8);
  EXPECT_EQ(batch->requests[1].rows.end, 12);
}

TEST(BatchesTest, OnlyRequestsOfOneKindAreMerged) {
  TestCluster cluster(Merging(200));
  cluster.Serve();
  cluster.Request(1, 8);
  cluster.Request(2, 8, {.layer = 4});
  cluster.Request(3, 8, {.row_type = RowType::kFp16});
  cluster.Request(4, 8, {.routed = false});
  cluster.Request(5, 8);
  const auto batches = All<StartBatch>(cluster.Sleep(200));
  ASSERT_EQ(batches.size(), 2u);
  EXPECT_THAT(Ids(batches[0].requests), ElementsAre(1, 5));
  EXPECT_THAT(Ids(batches[1].requests), ElementsAre(2));
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Finish(2))->requests), ElementsAre(3));
  const auto last = First<StartBatch>(cluster.Finish(3));
  EXPECT_THAT(Ids(last->requests), ElementsAre(4));
  EXPECT_FALSE(last->routed);
}

TEST(BatchesTest, FullBatchDoesNotWaitForTheWindow) {
  TestCluster cluster(Merging(200));
  cluster.Serve();
  cluster.Request(1, 32);
  const auto batch = First<StartBatch>(cluster.Request(2, 32));
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch->num_tokens, 64);
}

TEST(BatchesTest, RequestThatDoesNotFitWaitsAndIsNotOvertaken) {
  TestCluster cluster(Merging(200));
  cluster.Serve();
  cluster.Request(1, 40);
  const auto first = First<StartBatch>(cluster.Request(2, 30));
  ASSERT_TRUE(first);
  EXPECT_THAT(Ids(first->requests), ElementsAre(1));
  cluster.Request(3, 4);
  EXPECT_THAT(Ids(First<StartBatch>(cluster.Sleep(200))->requests), ElementsAre(2, 3));
}

TEST(BatchesTest, RoutedBatchNeedsNoCounts) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  EXPECT_TRUE(cluster.Do(cluster.CountsOf(0, 2, 1)).empty());
  EXPECT_EQ(cluster.snapshot().stale_messages, 1u);
}

TEST(BatchesTest, CountsOfAnUnroutedBatchAreGatheredAndSentToAll) {
  TestCluster cluster;
  cluster.Serve();
  EXPECT_FALSE(First<StartBatch>(cluster.Request(1, 8, {.routed = false}))->routed);
  for (int i : {3, 1, 0}) EXPECT_TRUE(cluster.Do(cluster.CountsOf(i, 2, i % 2)).empty());
  EXPECT_TRUE(cluster.Do(cluster.CountsOf(0, 2, 2)).empty());  // Repeated: the first holds.
  const auto sent = First<SendCountMatrix>(cluster.Do(cluster.CountsOf(2, 2, 2)));
  ASSERT_TRUE(sent);
  EXPECT_EQ(sent->streams.size(), 4u);
  EXPECT_THAT(sent->counts.rows, ElementsAre(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1));
  EXPECT_EQ(sent->counts.rows_per_expert[1], 1);
  EXPECT_EQ(sent->counts.rows_per_expert[2], 2);
}

TEST(BatchesTest, CountsThatDoNotFitFailTheBatchAndEndTheEpoch) {
  for (const int what : {0, 1, 2}) {
    TestCluster cluster;
    cluster.Serve();
    cluster.Request(1, 8, {.routed = false});
    Counts counts = cluster.CountsOf(1, 2, 1);
    if (what == 0) counts.rows_to_rank.pop_back();
    if (what == 1) counts.rows_to_rank[3] = 3;  // of a shard of 2
    if (what == 2) counts.rows_per_expert[5] = -1;
    const Commands commands = cluster.Do(counts);
    EXPECT_EQ(First<CompleteRequest>(commands)->code, absl::StatusCode::kInternal) << what;
    EXPECT_THAT(First<SendEpochEnded>(commands)->reason, HasSubstr("worker w1 (rank 1): counts:"));
  }
}

TEST(BatchesTest, TogetherModeSendsNoTriggers) {
  TestCluster cluster;
  cluster.Serve();
  const Commands commands = cluster.Request(1);
  EXPECT_FALSE(Has<SendDispatchTrigger>(commands));
  EXPECT_TRUE(cluster.Do(PhaseDone{cluster.stream(0), cluster.epoch, 2}).empty());
}

TEST(BatchesTest, SeparateTriggersFollowTheShardAndThePhases) {
  TestCluster cluster(Separate());
  cluster.Serve();
  const Commands started = cluster.Request(1);
  EXPECT_EQ(First<StartBatch>(started)->trigger, TriggerMode::kSeparate);
  EXPECT_LT(IndexOf<StartBatch>(started), IndexOf<SendDispatchTrigger>(started));
  EXPECT_EQ(First<SendDispatchTrigger>(started)->streams.size(), 4u);
  for (int i : {0, 1, 2, 0}) {
    EXPECT_TRUE(cluster.Do(PhaseDone{cluster.stream(i), cluster.epoch, 2}).empty());
  }
  const Commands last = cluster.Do(PhaseDone{cluster.stream(3), cluster.epoch, 2});
  EXPECT_EQ(First<SendCombineTrigger>(last)->streams.size(), 4u);
}

TEST(BatchesTest, SeparateTriggerOfAnUnroutedBatchFollowsItsCounts) {
  TestCluster cluster(Separate());
  cluster.Serve();
  EXPECT_FALSE(Has<SendDispatchTrigger>(cluster.Request(1, 8, {.routed = false})));
  for (int i : {0, 1, 2}) cluster.Do(cluster.CountsOf(i, 2, 1));
  const Commands commands = cluster.Do(cluster.CountsOf(3, 2, 1));
  EXPECT_GE(IndexOf<SendCountMatrix>(commands), 0);
  EXPECT_LT(IndexOf<SendCountMatrix>(commands), IndexOf<SendDispatchTrigger>(commands));
}

TEST(BatchesTest, ProbeIsTriggeredSeparatelyToo) {
  TestCluster cluster(Separate());
  cluster.JoinAndLoadAll();
  const Commands commands = cluster.Form();
  EXPECT_LT(IndexOf<StartProbe>(commands), IndexOf<SendDispatchTrigger>(commands));
  Commands last;
  for (int i = 0; i < 4; ++i) {
    last = cluster.Do(PhaseDone{cluster.stream(i), cluster.epoch, 1});
  }
  EXPECT_TRUE(Has<SendCombineTrigger>(last));
}

TEST(BatchesTest, WorkersOwnErrorIsInternalAndTheEpochLivesIfAllAnswer) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  const Commands failed = cluster.Do(
      BatchDone{cluster.stream(1), cluster.epoch, 2, absl::StatusCode::kInternal, "gemm failed"});
  const auto answer = First<CompleteRequest>(failed);
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->code, absl::StatusCode::kInternal);
  EXPECT_THAT(answer->message, HasSubstr("worker w1 (rank 1) failed batch 2"));
  EXPECT_THAT(answer->message, HasSubstr("gemm failed"));
  Commands last;
  for (int i : {0, 2, 3}) last = cluster.Do(BatchDone{cluster.stream(i), cluster.epoch, 2});
  EXPECT_TRUE(Has<DropBatch>(last));
  EXPECT_FALSE(Has<FinishBatch>(last));
  EXPECT_TRUE(cluster.snapshot().serving);
  EXPECT_EQ(cluster.snapshot().batches_in_flight, 0);
}

TEST(BatchesTest, PeersThatWaitForAFailedWorkerAreFreedByTheEndOfTheEpoch) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  cluster.Do(BatchDone{cluster.stream(1), cluster.epoch, 2, absl::StatusCode::kInternal, "x"});
  const Commands commands = cluster.Run(1'000'000);
  ASSERT_TRUE(Has<SendEpochEnded>(commands));
  EXPECT_THAT(First<SendEpochEnded>(commands)->reason, HasSubstr("worker w1 (rank 1) failed"));
}

TEST(BatchesTest, PeerTimeoutFailsEverythingUnavailableAndEndsTheEpoch) {
  for (const absl::StatusCode code :
       {absl::StatusCode::kDeadlineExceeded, absl::StatusCode::kAborted}) {
    TestCluster cluster;
    cluster.Serve();
    cluster.Request(1);
    cluster.Request(2);
    const Commands commands =
        cluster.Do(BatchDone{cluster.stream(3), cluster.epoch, 2, code, "rank 0 did not come"});
    const auto answers = All<CompleteRequest>(commands);
    ASSERT_EQ(answers.size(), 2u);
    EXPECT_EQ(answers[0].code, absl::StatusCode::kUnavailable);
    EXPECT_THAT(answers[1].message, HasSubstr("rank 0 did not come"));
    EXPECT_EQ(All<SendEpochEnded>(commands).size(), 4u);
  }
}

TEST(BatchesTest, BatchThatNeverEndsIsGivenUpNamingWhoIsMissing) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  for (int i : {0, 1, 3}) cluster.Do(BatchDone{cluster.stream(i), cluster.epoch, 2});
  EXPECT_FALSE(Has<SendEpochEnded>(cluster.Run(59'999'999)));
  const auto ended = First<SendEpochEnded>(cluster.Run(1));
  ASSERT_TRUE(ended);
  EXPECT_THAT(ended->reason, HasSubstr("worker w2 (rank 2) to finish for 60000 ms"));
  EXPECT_THAT(ended->reason, Not(HasSubstr("w3")));
}

TEST(BatchesTest, OldEpochsBatchDoneDoesNotTouchTheSameNumberedBatch) {
  TestCluster cluster;
  cluster.Serve();
  const EpochId old = cluster.epoch;
  cluster.Request(1);
  cluster.Do(EpochQuiesced{cluster.stream(0), old});
  cluster.QuiesceAll();
  cluster.FormAndProbe();
  ASSERT_EQ(cluster.epoch, old + 1);
  ASSERT_EQ(First<StartBatch>(cluster.Request(2))->batch, 2u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_TRUE(cluster.Do(BatchDone{cluster.stream(i), old, 2}).empty());
  }
  EXPECT_TRUE(Has<FinishBatch>(cluster.Finish(2)));
}

TEST(BatchesTest, DoneBatchesAreCountedPerWorker) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  cluster.Finish(2);
  for (const WorkerSnapshot& worker : cluster.snapshot().workers) EXPECT_EQ(worker.batches, 1u);
}

}  // namespace
}  // namespace epserve::coordinator
