// How a batch's count matrix is made, by mode, by what is seen of its ids and by what workers
// offer.
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Config With(CountExchangeMode mode, TriggerMode trigger = TriggerMode::kTogether) {
  Config config = TestConfig();
  config.count_exchange = mode;
  config.trigger = trigger;
  return config;
}

// How a batch is counted whose ids are seen, and one whose ids are not.
void ExpectCounts(TestCluster& cluster, CountExchange seen, CountExchange unseen) {
  EXPECT_EQ(First<StartBatch>(cluster.Request(1, 8, {.routed = true}))->counts, seen);
  EXPECT_EQ(First<StartBatch>(cluster.Request(2, 8, {.routed = false}))->counts, unseen);
}

TEST(CountExchangeTest, AutoLeavesUnseenIdsToWorkersThatAllOfferIt) {
  TestCluster cluster(With(CountExchangeMode::kAuto));
  cluster.device_counts = true;
  cluster.Serve();
  ExpectCounts(cluster, CountExchange::kCoordinator, CountExchange::kDevice);
}

TEST(CountExchangeTest, AutoGathersOverTheStreamsWhereOneWorkerDoesNotOfferIt) {
  TestCluster cluster(With(CountExchangeMode::kAuto));
  cluster.device_counts = true;
  for (int i = 0; i < 3; ++i) cluster.Join("w" + std::to_string(i));
  cluster.device_counts = false;
  cluster.Join("w3");
  for (int i = 0; i < 4; ++i) cluster.Load(i, i);
  cluster.FormAndProbe();
  ExpectCounts(cluster, CountExchange::kCoordinator, CountExchange::kStreams);
}

TEST(CountExchangeTest, IdsThatOnlyWorkersCanReadAreCountedByThemAndNotMergedWithOthers) {
  Config config = With(CountExchangeMode::kAuto);
  config.merge_queued = true;
  config.num_slots = 1;
  TestCluster cluster(config);
  cluster.Serve();
  const RequestArrived hidden = {.routed = true, .ids_hidden = true};
  const std::optional<StartBatch> first = First<StartBatch>(cluster.Request(1, 8, hidden));
  ASSERT_TRUE(first.has_value());
  EXPECT_TRUE(first->routed);
  EXPECT_EQ(first->counts, CountExchange::kStreams);
  cluster.Request(2, 8, hidden);
  cluster.Request(3, 8);
  cluster.Request(4, 8, hidden);
  for (int i = 0; i < 4; ++i) cluster.Do(cluster.CountsOf(i, first->batch));
  const std::optional<StartBatch> second = First<StartBatch>(cluster.Finish(first->batch));
  ASSERT_TRUE(second.has_value());
  ASSERT_EQ(second->requests.size(), 2u);
  EXPECT_EQ(second->requests[0].request, 2u);
  EXPECT_EQ(second->requests[1].request, 4u);
}

TEST(CountExchangeTest, CoordinatorNeverLeavesItToTheWorkers) {
  TestCluster cluster(With(CountExchangeMode::kCoordinator));
  cluster.device_counts = true;
  cluster.Serve();
  ExpectCounts(cluster, CountExchange::kCoordinator, CountExchange::kStreams);
}

TEST(CountExchangeTest, DeviceLeavesEveryBatchToTheWorkers) {
  TestCluster cluster(With(CountExchangeMode::kDevice));
  cluster.device_counts = true;
  cluster.Serve();
  ExpectCounts(cluster, CountExchange::kDevice, CountExchange::kDevice);
}

TEST(CountExchangeTest, ProbeIsCountedAsABatchWhoseIdsAreSeen) {
  for (const CountExchangeMode mode :
       {CountExchangeMode::kAuto, CountExchangeMode::kCoordinator, CountExchangeMode::kDevice}) {
    TestCluster cluster(With(mode));
    cluster.device_counts = true;
    cluster.JoinAndLoadAll();
    EXPECT_EQ(First<StartProbe>(cluster.Form())->counts, mode == CountExchangeMode::kDevice
                                                             ? CountExchange::kDevice
                                                             : CountExchange::kCoordinator);
  }
}

TEST(CountExchangeTest, DeviceRejectsAWorkerWhoseBackendCannotAndSaysWhatToDo) {
  TestCluster cluster(With(CountExchangeMode::kDevice));
  const auto rejected = First<RejectWorker>(cluster.Join("w0", {.backend = "cuda"}));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->code, absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(rejected->message,
              HasSubstr("worker w0 has backend cuda, whose ranks do not exchange counts"));
  EXPECT_THAT(rejected->message, HasSubstr("--count-exchange=auto or coordinator"));
  EXPECT_TRUE(cluster.snapshot().workers.empty());
}

TEST(CountExchangeTest, CountsOfABatchThatTheWorkersCountAreStale) {
  TestCluster cluster(With(CountExchangeMode::kAuto));
  cluster.device_counts = true;
  cluster.Serve();
  cluster.Request(1, 8, {.routed = false});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(cluster.Do(cluster.CountsOf(i, 2)).empty());
  EXPECT_EQ(cluster.snapshot().stale_messages, 4u);
  EXPECT_TRUE(Has<FinishBatch>(cluster.Finish(2)));
}

TEST(CountExchangeTest, DispatchIsTriggeredWithTheShardsOfABatchThatTheWorkersCount) {
  TestCluster cluster(With(CountExchangeMode::kAuto, TriggerMode::kSeparate));
  cluster.device_counts = true;
  cluster.JoinAndLoadAll();
  cluster.Form();
  for (int i = 0; i < 4; ++i) cluster.Do(PhaseDone{cluster.stream(i), cluster.epoch, 1});
  cluster.Probe();
  const Commands commands = cluster.Request(1, 8, {.routed = false});
  EXPECT_GE(IndexOf<StartBatch>(commands), 0);
  EXPECT_LT(IndexOf<StartBatch>(commands), IndexOf<SendDispatchTrigger>(commands));
}

TEST(CountExchangeTest, WorkerThatNeverAnswersWhileTheOthersCountIsNamed) {
  TestCluster cluster(With(CountExchangeMode::kDevice));
  cluster.device_counts = true;
  cluster.Serve();
  cluster.Request(1);
  for (int i : {0, 1, 3}) cluster.Do(BatchDone{cluster.stream(i), cluster.epoch, 2});
  const auto ended = First<SendEpochEnded>(cluster.Run(60'000'000));
  ASSERT_TRUE(ended);
  EXPECT_THAT(ended->reason, HasSubstr("worker w2 (rank 2) to finish for 60000 ms"));
  EXPECT_THAT(ended->reason, Not(HasSubstr("to count")));
}

TEST(CountExchangeTest, PeerTimeoutInTheExchangeFailsTheRequestUnavailable) {
  TestCluster cluster(With(CountExchangeMode::kDevice));
  cluster.device_counts = true;
  cluster.Serve();
  cluster.Request(1);
  const Commands commands =
      cluster.Do(BatchDone{cluster.stream(3), cluster.epoch, 2, absl::StatusCode::kDeadlineExceeded,
                           "counts: rank 3 waited"});
  const auto answer = First<CompleteRequest>(commands);
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(answer->message, HasSubstr("counts: rank 3 waited"));
  EXPECT_EQ(All<SendEpochEnded>(commands).size(), 4u);
}

}  // namespace
}  // namespace epserve::coordinator
