// What faults cost the daemon: lost streams, ended epochs, expired leases, failed steps; over real
// gRPC, against a scripted coordinator and a fake engine.
#include "server/worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/server/worker/worker_harness.h"

namespace epserve::worker {
namespace {

using testing::HasSubstr;

constexpr std::int64_t kLeaseUs = FakeControlService::kLeaseUs;

TEST_F(WorkerTest, EpochEndedInMidBatchQuiescesAndItsBatchSaysNothingMore) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  engine_->Hold("dispatch 0");
  session->Send(ShardMessage(7, 1));
  v1::CoordinatorMessage waiting = ShardMessage(7, 2, 1);
  waiting.mutable_shard()->set_trigger(v1::TRIGGER_SEPARATE);
  session->Send(waiting);
  ASSERT_TRUE(engine_->AwaitStep("dispatch 0"));
  ASSERT_TRUE(engine_->AwaitStep("stage 1"));
  session->Send(EpochEndedMessage(7));
  const v1::WorkerMessage quiesced = session->Next();
  ASSERT_TRUE(quiesced.has_epoch_quiesced()) << quiesced.DebugString();
  EXPECT_EQ(quiesced.epoch_quiesced().epoch(), 7u);
  EXPECT_EQ(engine_->Count("discard 0"), 1);
  EXPECT_EQ(engine_->Count("close"), 1);
  engine_->Release("dispatch 0");
  // The very next things said belong to the new epoch.
  FormEpoch(*session, 8);
  RunBatch(*session, 8, 1);
  EXPECT_EQ(engine_->Count("load"), 1);
}

TEST_F(WorkerTest, HeartbeatsAndOtherBatchesGoOnWhileABatchKeepsTheStreamsThread) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  engine_->Hold("dispatch 0");
  session->Send(ShardMessage(7, 1));
  ASSERT_TRUE(engine_->AwaitStep("dispatch 0"));
  ASSERT_TRUE(session->AwaitHeartbeats(session->num_heartbeats() + 3));
  RunBatch(*session, 7, 2, 1);
  engine_->Release("dispatch 0");
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().batch(), 1u);
  // The thread that was kept is of use again.
  engine_->Hold("combine 1");
  session->Send(ShardMessage(7, 3, 1));
  ASSERT_TRUE(engine_->AwaitStep("combine 1", 2));
  RunBatch(*session, 7, 4);
  engine_->Release("combine 1");
  EXPECT_EQ(session->Next().batch_done().batch(), 3u);
}

TEST_F(WorkerTest, BrokenStreamQuiescesThenReconnectsWithTheRankHeld) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  engine_->Hold("dispatch 0");
  session->Send(ShardMessage(7, 1));
  ASSERT_TRUE(engine_->AwaitStep("dispatch 0"));
  session->Break();
  v1::Hello hello;
  session = Greet(&hello);
  ASSERT_NE(session, nullptr);
  EXPECT_EQ(engine_->Count("close"), 1) << "hello came before the old epoch was closed";
  EXPECT_EQ(hello.held_rank(), 1);
  EXPECT_EQ(hello.held_num_ranks(), 2);
  EXPECT_EQ(hello.last_epoch(), 7u);
  engine_->Release("dispatch 0");
  session->Send(AssignmentMessage());
  const v1::WorkerMessage loaded = session->Next();
  ASSERT_TRUE(loaded.has_loaded()) << loaded.DebugString();
  EXPECT_EQ(engine_->Count("load"), 1) << "the weights were loaded again";
  FormEpoch(*session, 8);
  RunBatch(*session, 8, 1);
}

// Reads, writes, batches and the stream's end meet in ever other orders.
TEST_F(WorkerTest, StreamsBrokenAmidBatchesAreAlwaysReplaced) {
  std::shared_ptr<ControlSession> session = Serve(1);
  for (std::uint64_t epoch = 1; epoch < 20; ++epoch) {
    ASSERT_NE(session, nullptr);
    for (std::uint64_t batch = 1; batch <= epoch % 4; ++batch) {
      session->Send(ShardMessage(epoch, batch, static_cast<int>(batch % 2)));
    }
    session->Break();
    session = GreetAndLoad();
    ASSERT_NE(session, nullptr);
    FormEpoch(*session, epoch + 1);
  }
  RunBatch(*session, 20, 1);
}

TEST_F(WorkerTest, RestartedCoordinatorIsFoundWithinTwoSeconds) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  std::chrono::steady_clock::duration took{};
  // A busy machine may be slow once or twice; a back-off that grows on would be each time.
  for (int attempt = 1; attempt <= 3; ++attempt) {
    StopCoordinator();
    ASSERT_TRUE(engine_->AwaitStep("close", attempt));
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));  // Lets the back-off grow.
    const auto restarted = std::chrono::steady_clock::now();
    StartCoordinator();
    session = GreetAndLoad();
    ASSERT_NE(session, nullptr);
    took = std::chrono::steady_clock::now() - restarted;
    EXPECT_EQ(engine_->Count("load"), 1);
    if (took < std::chrono::seconds(2)) break;
    FormEpoch(*session, 7 + static_cast<std::uint64_t>(attempt));
  }
  EXPECT_LT(took, std::chrono::seconds(2));
}

TEST_F(WorkerTest, ExpiredLeaseStopsDispatchAndEndsTheEpochUnasked) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  RunBatch(*session, 7, 1);
  coordinator_->set_answer_heartbeats(false);
  now_us_ += kLeaseUs;  // To the microsecond: until then it was fresh.
  session->Send(ShardMessage(7, 2));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), static_cast<int>(absl::StatusCode::kAborted));
  EXPECT_THAT(done.batch_done().message(), HasSubstr("lease"));
  EXPECT_TRUE(done.batch_done().output().empty());
  const v1::WorkerMessage quiesced = session->Next();
  ASSERT_TRUE(quiesced.has_epoch_quiesced()) << quiesced.DebugString();
  EXPECT_EQ(quiesced.epoch_quiesced().epoch(), 7u);
  EXPECT_EQ(engine_->Count("dispatch 0"), 1);
  EXPECT_EQ(engine_->Count("close"), 1);
  coordinator_->set_answer_heartbeats(true);
  session->Send(CreateHeapMessage(8));
  EXPECT_TRUE(session->Next().has_heap_created());
}

TEST_F(WorkerTest, LeaseThatExpiresBetweenThePhasesStopsCombine) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  v1::CoordinatorMessage shard = ShardMessage(7, 1);
  shard.mutable_shard()->set_trigger(v1::TRIGGER_SEPARATE);
  session->Send(shard);
  session->Send(DispatchTriggerMessage(7, 1));
  ASSERT_TRUE(session->Next().has_phase_done());
  coordinator_->set_answer_heartbeats(false);
  now_us_ += kLeaseUs;
  session->Send(CombineTriggerMessage(7, 1));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), static_cast<int>(absl::StatusCode::kAborted));
  EXPECT_TRUE(session->Next().has_epoch_quiesced());
  EXPECT_EQ(engine_->Count("combine 0"), 0);
}

TEST_F(WorkerTest, LeaseOfAnotherEpochIsNone) {
  StartCoordinator();
  coordinator_->set_lease_epoch_offset(-1);
  StartWorker();
  std::shared_ptr<ControlSession> session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  FormEpoch(*session, 7);
  session->Send(ShardMessage(7, 1));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), static_cast<int>(absl::StatusCode::kAborted));
  EXPECT_EQ(engine_->Count("dispatch 0"), 0);
}

TEST_F(WorkerTest, SilentCoordinatorIsGivenUpAndConnectedAnew) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  coordinator_->set_answer_heartbeats(false);
  now_us_ += 5 * kLeaseUs;
  ASSERT_TRUE(session->AwaitEnd());
  v1::Hello hello;
  ASSERT_NE(Greet(&hello), nullptr);
  EXPECT_EQ(hello.last_epoch(), 7u);
  EXPECT_EQ(hello.held_rank(), 1);
  EXPECT_EQ(engine_->Count("close"), 1);
}

TEST_F(WorkerTest, StreamBrokenDuringALoadDoesNotStartItAgain) {
  engine_->Hold("load");
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(AssignmentMessage());
  ASSERT_TRUE(engine_->AwaitStep("load"));
  session->Break();
  v1::Hello hello;
  session = Greet(&hello);
  ASSERT_NE(session, nullptr);
  EXPECT_EQ(hello.held_rank(), -1);
  session->Send(AssignmentMessage());
  engine_->Release("load");
  EXPECT_TRUE(session->Next().has_loaded());
  EXPECT_EQ(engine_->Count("load"), 1);
}

TEST_F(WorkerTest, DamagedCheckpointIsReportedAndEndsTheWorker) {
  engine_->FailAt("load", absl::DataLossError("model.safetensors: tensor w1 ends past the file"));
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(AssignmentMessage());
  const v1::WorkerMessage failure = session->Next();
  ASSERT_TRUE(failure.has_failure()) << failure.DebugString();
  EXPECT_EQ(failure.failure().code(), static_cast<int>(absl::StatusCode::kDataLoss));
  EXPECT_THAT(failure.failure().message(), HasSubstr("tensor w1"));
  const absl::Status status = AwaitExit();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.safetensors: tensor w1"));
}

TEST_F(WorkerTest, WeightsThatDoNotFitAreRefusedBeforeLoading) {
  engine_->set_plan({.weight_bytes = 3 << 20, .heap_bytes = 1 << 10, .held_type = "fp32"});
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(AssignmentMessage());
  EXPECT_TRUE(session->Next().has_failure());
  EXPECT_EQ(AwaitExit().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine_->Count("load"), 0);
}

TEST_F(WorkerTest, PeersThatCannotBeOpenedCostTheEpochAndNotTheProcess) {
  engine_->FailAt("open peer,own", absl::NotFoundError("open: heap of rank 0 is gone"));
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  session->Send(CreateHeapMessage(7));
  ASSERT_TRUE(session->Next().has_heap_created());
  session->Send(OpenPeersMessage(7));
  const v1::WorkerMessage failure = session->Next();
  ASSERT_TRUE(failure.has_failure()) << failure.DebugString();
  EXPECT_THAT(failure.failure().message(), HasSubstr("rank 0 is gone"));
  engine_->FailAt("open peer,own", absl::OkStatus());
  session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  EXPECT_EQ(engine_->Count("load"), 1);
  FormEpoch(*session, 8);
  RunBatch(*session, 8, 1);
}

// A lost GPU cannot be had back by this process, so it ends, for its supervisor to start another.
TEST_F(WorkerTest, HeapThatFailsWithInternalEndsTheWorker) {
  engine_->FailAt("create", absl::InternalError("create heap: GPU 0 hangs; restart the worker"));
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  session->Send(CreateHeapMessage(7));
  const v1::WorkerMessage failure = session->Next();
  ASSERT_TRUE(failure.has_failure()) << failure.DebugString();
  const absl::Status status = AwaitExit();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("GPU 0 hangs"));
}

TEST_F(WorkerTest, FailedBatchIsReportedAndTheEpochGoesOn) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  engine_->FailAt("stage 0", absl::InvalidArgumentError("stage: layer 99 has no experts"));
  session->Send(ShardMessage(7, 1));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(done.batch_done().message(), HasSubstr("layer 99"));
  EXPECT_EQ(engine_->Count("discard 0"), 1);
  engine_->FailAt("stage 0", absl::OkStatus());
  RunBatch(*session, 7, 2);
}

TEST_F(WorkerTest, MessagesOfAnOldEpochChangeNothing) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  v1::CoordinatorMessage waiting = ShardMessage(7, 1);
  waiting.mutable_shard()->set_trigger(v1::TRIGGER_SEPARATE);
  session->Send(waiting);
  ASSERT_TRUE(engine_->AwaitStep("stage 0"));
  const std::vector<std::string> before = engine_->calls();
  session->Send(CreateHeapMessage(6));
  session->Send(CreateHeapMessage(7));
  session->Send(OpenPeersMessage(6));
  session->Send(EpochStartedMessage(6));
  session->Send(EpochEndedMessage(6));
  session->Send(ShardMessage(6, 1, 1));
  session->Send(CountMatrixMessage(6, 1));
  session->Send(DispatchTriggerMessage(6, 1));
  session->Send(CombineTriggerMessage(6, 1));
  // Messages are taken in order, so these have been by the time this one is done.
  RunBatch(*session, 7, 2, 1);
  std::vector<std::string> expected = before;
  for (const char* step : {"stage 1", "dispatch 1", "experts 1", "combine 1", "finish 1"}) {
    expected.emplace_back(step);
  }
  EXPECT_EQ(engine_->calls(), expected);
  session->Send(DispatchTriggerMessage(7, 1));
  EXPECT_TRUE(session->Next().has_phase_done());
}

}  // namespace
}  // namespace epserve::worker
