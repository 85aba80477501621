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
