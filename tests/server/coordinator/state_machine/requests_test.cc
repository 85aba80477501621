// What a request gets: each status, the queue, deadlines and cancellation.
#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::HasSubstr;

CompleteRequest Completion(const Commands& commands) {
  const auto all = All<CompleteRequest>(commands);
  EXPECT_EQ(all.size(), 1u);
  return all.empty() ? CompleteRequest{} : all.front();
}

// Fills both slots with requests 901 and 902 (batches 2 and 3).
void FillSlots(TestCluster& cluster) {
  ASSERT_TRUE(Has<StartBatch>(cluster.Request(901)));
  ASSERT_TRUE(Has<StartBatch>(cluster.Request(902)));
}

TEST(RequestsTest, WithoutWorkersIsUnavailableNamingTheExperts) {
  TestCluster cluster;
  const CompleteRequest answer = Completion(cluster.Request(1));
  EXPECT_EQ(answer.code, absl::StatusCode::kUnavailable);
  EXPECT_EQ(answer.message,
            "infer: 64 of 64 experts have no live worker (0 of 4 workers joined); retry when the "
            "service is ready");
}

TEST(RequestsTest, WithoutOneWorkerIsUnavailableNamingTheExperts) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Do(StreamClosed{cluster.stream(1)});
  const CompleteRequest answer = Completion(cluster.Request(1));
  EXPECT_EQ(answer.code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(answer.message, HasSubstr("16 of 64 experts have no live worker (3 of 4 workers"));
}

TEST(RequestsTest, WhileLoadingIsUnavailable) {
  TestCluster cluster;
  for (int i = 0; i < 4; ++i) cluster.Join("w" + std::to_string(i));
  cluster.Load(0, 0);
  const CompleteRequest answer = Completion(cluster.Request(1));
  EXPECT_EQ(answer.code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(answer.message, HasSubstr("3 of 4 workers are loading weights"));
}

TEST(RequestsTest, WhileProbingIsUnavailable) {
  TestCluster cluster;
  cluster.JoinAndLoadAll();
  cluster.Form();
  EXPECT_EQ(Completion(cluster.Request(1)).code, absl::StatusCode::kUnavailable);
}

TEST(RequestsTest, TooManyTokensIsInvalidNamingTheLimit) {
  TestCluster cluster;
  cluster.Serve();
  const CompleteRequest answer = Completion(cluster.Request(1, 65));
  EXPECT_EQ(answer.code, absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(answer.message, HasSubstr("num_tokens 65"));
  EXPECT_THAT(answer.message, HasSubstr("max_batch_tokens 64"));
  EXPECT_EQ(Completion(cluster.Request(2, -1)).code, absl::StatusCode::kInvalidArgument);
}

TEST(RequestsTest, UnknownLayerIsNotFound) {
  TestCluster cluster;
  cluster.Serve();
  EXPECT_EQ(Completion(cluster.Request(1, 8, {.layer = 5})).code, absl::StatusCode::kNotFound);
}

TEST(RequestsTest, NoTokensIsOkAtOnceWhileServing) {
  TestCluster cluster;
  EXPECT_EQ(Completion(cluster.Request(1, 0)).code, absl::StatusCode::kUnavailable);
  cluster.Serve();
  const Commands commands = cluster.Request(2, 0);
  EXPECT_EQ(Completion(commands).code, absl::StatusCode::kOk);
  EXPECT_EQ(Completion(commands).epoch, cluster.epoch);
  EXPECT_FALSE(Has<StartBatch>(commands));
  EXPECT_EQ(cluster.snapshot().requests_ok, 1u);
}

TEST(RequestsTest, FullQueueIsResourceExhaustedWithAPushback) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  for (RequestId id = 1; id <= 4; ++id) EXPECT_TRUE(cluster.Request(id).empty());
  EXPECT_EQ(cluster.snapshot().queued_requests, 4);
  const CompleteRequest answer = Completion(cluster.Request(5));
  EXPECT_EQ(answer.code, absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(answer.message, HasSubstr("holds 4 requests of at most 4"));
  EXPECT_GE(answer.pushback_ms, 10);
  EXPECT_LE(answer.pushback_ms, 5000);
  cluster.Finish(2);
  EXPECT_TRUE(cluster.Request(6).empty());  // A place came free.
}

// The request that the next batch starts with, once a slot comes free.
RequestId NextStarted(TestCluster& cluster, BatchId finished) {
  const auto started = First<StartBatch>(cluster.Finish(finished));
  return started ? started->requests.front().request : 0;
}

TEST(RequestsTest, CallersTakeTurnsAndEachOnesRequestsKeepTheirOrder) {
  Config config = TestConfig();
  config.queue_capacity = 10;
  TestCluster cluster(config);
  cluster.Serve();
  FillSlots(cluster);
  for (RequestId id = 11; id <= 14; ++id) cluster.Request(id, 8, {.caller = 1});
  for (RequestId id = 21; id <= 22; ++id) cluster.Request(id, 8, {.caller = 2});
  cluster.Request(31, 8, {.caller = 3});
  std::vector<RequestId> order;
  for (BatchId batch = 2; order.size() < 7; ++batch) order.push_back(NextStarted(cluster, batch));
  EXPECT_THAT(order, ::testing::ElementsAre(11, 21, 31, 12, 22, 13, 14));
}

TEST(RequestsTest, CallerWhoseRequestsHaveGoneGivesUpItsTurn) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  cluster.Request(11, 8, {.caller = 1});
  cluster.Request(21, 8, {.caller = 2});
  cluster.Request(12, 8, {.caller = 1});
  cluster.Do(RequestCancelled{21});
  EXPECT_EQ(NextStarted(cluster, 2), 11u);
  EXPECT_EQ(NextStarted(cluster, 3), 12u);
}

TEST(RequestsTest, FullQueueYieldsTheNewestOfWhoHoldsMostToWhoHoldsLess) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  for (RequestId id = 11; id <= 14; ++id) cluster.Request(id, 8, {.caller = 1});
  // The caller that fills it is refused itself.
  EXPECT_EQ(Completion(cluster.Request(15, 8, {.caller = 1})).request, 15u);
  const CompleteRequest first = Completion(cluster.Request(21, 8, {.caller = 2}));
  EXPECT_EQ(first.request, 14u);
  EXPECT_EQ(first.code, absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(first.message, HasSubstr("4 of them of this connection"));
  EXPECT_GE(first.pushback_ms, 10);
  EXPECT_EQ(Completion(cluster.Request(22, 8, {.caller = 2})).request, 13u);
  EXPECT_EQ(cluster.snapshot().queued_requests, 4);
  // Two each: neither may push the other out.
  EXPECT_EQ(Completion(cluster.Request(23, 8, {.caller = 2})).request, 23u);
  EXPECT_EQ(Completion(cluster.Request(16, 8, {.caller = 1})).request, 16u);
  EXPECT_EQ(NextStarted(cluster, 2), 11u);
  EXPECT_EQ(NextStarted(cluster, 3), 21u);
}

TEST(RequestsTest, MergingStartsWithTheCallerWhoseTurnItIsAndWaitsForTheOldest) {
  Config config = TestConfig();
  config.batch_window_us = 100;
  config.queue_capacity = 10;
  TestCluster cluster(config);
  cluster.Serve();
  cluster.Request(11, 40, {.caller = 1});
  EXPECT_FALSE(Has<StartBatch>(cluster.Sleep(50)));
  cluster.Request(12, 40, {.caller = 1});  // Does not fit beside 11: that goes at once.
  cluster.Request(21, 20, {.caller = 2, .layer = 4});
  const auto started = All<StartBatch>(cluster.Sleep(100));
  ASSERT_EQ(started.size(), 1u) << "11 had gone, and there are two slots";
  EXPECT_EQ(started[0].requests.front().request, 12u);
}

TEST(RequestsTest, PushbackGrowsWithTheTimeBatchesTake) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  cluster.Run(400'000);
  cluster.Finish(2);
  FillSlots(cluster);
  for (RequestId id = 11; id <= 14; ++id) cluster.Request(id);
  EXPECT_EQ(Completion(cluster.Request(15)).pushback_ms, 800);  // 4 requests, 2 slots, 400 ms each
}

TEST(RequestsTest, DeadlineInTheQueueFreesThePlaceAndStartsNoWork) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  cluster.Request(1, 8, {.deadline_us = cluster.now_us + 5'000});
  EXPECT_FALSE(Has<CompleteRequest>(cluster.Sleep(4'999)));
  const CompleteRequest answer = Completion(cluster.Sleep(1));
  EXPECT_EQ(answer.request, 1u);
  EXPECT_EQ(answer.code, absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(cluster.snapshot().queued_requests, 0);
  EXPECT_FALSE(Has<StartBatch>(cluster.Finish(2)));
}

TEST(RequestsTest, DeadlineThatPassesUnseenStillStartsNoWork) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  cluster.Request(1, 8, {.deadline_us = cluster.now_us + 5'000});
  cluster.now_us += 6'000;  // No Tick came in between.
  const Commands commands = cluster.Finish(2);
  EXPECT_FALSE(Has<StartBatch>(commands));
  EXPECT_EQ(Completion(commands).code, absl::StatusCode::kDeadlineExceeded);
}

TEST(RequestsTest, DeadlineAlreadyPassedIsRefused) {
  TestCluster cluster;
  cluster.Serve();
  const Commands commands = cluster.Request(1, 8, {.deadline_us = cluster.now_us});
  EXPECT_EQ(Completion(commands).code, absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(Has<StartBatch>(commands));
}

TEST(RequestsTest, DeadlineInFlightAnswersAtOnceAndTheResultIsDropped) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1, 8, {.deadline_us = cluster.now_us + 5'000});
  EXPECT_EQ(Completion(cluster.Sleep(5'000)).code, absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(cluster.snapshot().batches_in_flight, 1);
  const Commands commands = cluster.Finish(2);
  ASSERT_TRUE(Has<FinishBatch>(commands));
  EXPECT_TRUE(First<FinishBatch>(commands)->requests.empty());
  EXPECT_FALSE(Has<CompleteRequest>(commands));
}

TEST(RequestsTest, CancelInTheQueueFreesThePlaceAndStartsNoWork) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  cluster.Request(1);
  EXPECT_EQ(Completion(cluster.Do(RequestCancelled{1})).code, absl::StatusCode::kCancelled);
  EXPECT_EQ(cluster.snapshot().queued_requests, 0);
  EXPECT_FALSE(Has<StartBatch>(cluster.Finish(2)));
  EXPECT_TRUE(cluster.Do(RequestCancelled{1}).empty());
}

TEST(RequestsTest, CancelInFlightAnswersAtOnceAndTheBatchGoesOnForTheOthers) {
  Config config = TestConfig();
  config.batch_window_us = 100;
  TestCluster cluster(config);
  cluster.Serve();
  cluster.Request(1, 8);
  cluster.Request(2, 4);
  ASSERT_TRUE(Has<StartBatch>(cluster.Sleep(100)));
  EXPECT_EQ(Completion(cluster.Do(RequestCancelled{1})).code, absl::StatusCode::kCancelled);
  const auto finished = First<FinishBatch>(cluster.Finish(2));
  ASSERT_TRUE(finished);
  ASSERT_EQ(finished->requests.size(), 1u);
  EXPECT_EQ(finished->requests[0].request, 2u);
  EXPECT_EQ(finished->requests[0].rows.begin, 8);
  EXPECT_EQ(finished->requests[0].rows.end, 12);
}

TEST(RequestsTest, LostWorkerFailsQueuedAndInFlightAtOnce) {
  TestCluster cluster;
  cluster.Serve();
  FillSlots(cluster);
  cluster.Request(1);
  const Commands commands = cluster.Do(StreamClosed{cluster.stream(2)});
  const auto answers = All<CompleteRequest>(commands);
  ASSERT_EQ(answers.size(), 3u);
  for (const CompleteRequest& answer : answers) {
    EXPECT_EQ(answer.code, absl::StatusCode::kUnavailable);
    EXPECT_THAT(answer.message, HasSubstr("worker w2 (rank 2) was lost: its stream closed"));
    EXPECT_THAT(answer.message, HasSubstr("16 of 64 experts have no live worker"));
  }
  EXPECT_EQ(All<DropBatch>(commands).size(), 2u);
  EXPECT_FALSE(First<SetServing>(commands)->serving);
  EXPECT_EQ(cluster.snapshot().requests_in_flight, 0);
}

TEST(RequestsTest, SameIdAgainWhileLiveIsIgnored) {
  TestCluster cluster;
  cluster.Serve();
  cluster.Request(1);
  EXPECT_TRUE(cluster.Request(1).empty());
  EXPECT_EQ(All<FinishBatch>(cluster.Finish(2)).size(), 1u);
  EXPECT_EQ(cluster.snapshot().requests_ok, 1u);
}

TEST(RequestsTest, NothingIsKeptOfWhatEnded) {
  TestCluster cluster;
  cluster.Serve();
  for (RequestId id = 1; id <= 500; ++id) {
    cluster.Request(id, 8, {.deadline_us = cluster.now_us + 1'000'000});
    if (id % 3 == 0) cluster.Do(RequestCancelled{id});
    cluster.Finish(id + 1);
  }
  const Snapshot snapshot = cluster.snapshot();
  EXPECT_EQ(snapshot.queued_requests + snapshot.requests_in_flight + snapshot.batches_in_flight, 0);
  EXPECT_EQ(snapshot.requests_ok + snapshot.requests_failed, 500u);
  // No deadline of an ended request wakes the host.
  EXPECT_GE(*cluster.machine.NextDeadline(), snapshot.workers[0].last_heartbeat_us + 1'000'000);
}

}  // namespace
}  // namespace epserve::coordinator
