// The daemon as a whole, over real gRPC, against a scripted coordinator and a fake engine.
#include "server/worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "server/common/probe.h"
#include "tests/server/worker/worker_harness.h"

namespace epserve::worker {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr std::int64_t kLeaseUs = FakeControlService::kLeaseUs;

TEST_F(WorkerTest, JoinsLoadsAndServesTheFirstEpochInOrder) {
  StartCoordinator();
  StartWorker();
  v1::Hello hello;
  std::shared_ptr<ControlSession> session = Greet(&hello);
  ASSERT_NE(session, nullptr);
  EXPECT_EQ(hello.worker_id(), "w1");
  EXPECT_EQ(hello.version(), "1.2.3");
  EXPECT_EQ(hello.cluster_id(), "test");
  EXPECT_EQ(hello.backend(), "host");
  EXPECT_EQ(hello.max_batch_tokens(), 16);
  EXPECT_EQ(hello.held_rank(), -1);
  EXPECT_EQ(hello.last_epoch(), 0u);
  EXPECT_FALSE(hello.incarnation().empty());
  EXPECT_EQ(hello.model().fingerprint(), "f00d");
  EXPECT_THAT(hello.model().layers(), ElementsAre(3, 4));

  session->Send(AssignmentMessage());
  const v1::WorkerMessage loaded = session->Next();
  ASSERT_TRUE(loaded.has_loaded()) << loaded.DebugString();
  EXPECT_EQ(loaded.loaded().rank(), 1);
  EXPECT_EQ(loaded.loaded().num_ranks(), 2);
  EXPECT_EQ(loaded.loaded().weight_bytes(), 1000u);
  EXPECT_EQ(loaded.loaded().heap_bytes(), 200u);
  EXPECT_GE(session->progress_reports(), 1);

  session->Send(CreateHeapMessage(7));
  const v1::WorkerMessage created = session->Next();
  ASSERT_TRUE(created.has_heap_created()) << created.DebugString();
  EXPECT_EQ(created.heap_created().handle(), "heap-7");

  session->Send(OpenPeersMessage(7));
  const v1::WorkerMessage opened = session->Next();
  ASSERT_TRUE(opened.has_peers_opened()) << opened.DebugString();
  // Expert 4 is this rank's first, layer 3 the model's.
  ASSERT_EQ(opened.peers_opened().probe_output_size(), FakeEngine::kHidden);
  EXPECT_EQ(opened.peers_opened().probe_output(0), 304.0f);
  EXPECT_EQ(opened.peers_opened().probe_output(1), server::ProbeValue(1));

  ASSERT_TRUE(session->AwaitLease(7));
  session->Send(EpochStartedMessage(7));
  RunBatch(*session, 7, 1);
  EXPECT_THAT(engine_->calls(), ElementsAre("load", "create", "open peer,own", "seal", "stage 0",
                                            "dispatch 0", "experts 0", "combine 0", "finish 0"));
}

TEST_F(WorkerTest, BatchDoneCarriesTimesAndLocalExpertRows) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  session->Send(ShardMessage(7, 1));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done());
  EXPECT_THAT(done.batch_done().local_expert_rows(), ElementsAre(3, 3, 3, 3));
  EXPECT_EQ(done.batch_done().times().dispatch_ns(), 11);
  EXPECT_EQ(done.batch_done().times().ffn_ns(), 22);
  EXPECT_EQ(done.batch_done().times().combine_ns(), 33);
  EXPECT_EQ(done.batch_done().times().counts_ns(), 0);
  EXPECT_GT(done.batch_done().times().assign_ns(), 0);
  EXPECT_GT(done.batch_done().times().start_monotonic_ns(), 0);
}

TEST_F(WorkerTest, ShardsThatArriveBeforeTheHeapIsSealedWaitForIt) {
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  session->Send(CreateHeapMessage(7));
  ASSERT_TRUE(session->Next().has_heap_created());
  session->Send(OpenPeersMessage(7));
  ASSERT_TRUE(session->Next().has_peers_opened());
  ASSERT_TRUE(session->AwaitLease(7));
  session->Send(ShardMessage(7, 1));
  session->Send(EpochStartedMessage(7));
  ASSERT_TRUE(session->Next().has_batch_done());
  EXPECT_THAT(engine_->calls(), ElementsAre("load", "create", "open peer,own", "seal", "stage 0",
                                            "dispatch 0", "experts 0", "combine 0", "finish 0"));
}

TEST_F(WorkerTest, SeparateTriggersHoldDispatchAndCombineUntilTheyCome) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  v1::CoordinatorMessage shard = ShardMessage(7, 1);
  shard.mutable_shard()->set_trigger(v1::TRIGGER_SEPARATE);
  session->Send(shard);
  ASSERT_TRUE(engine_->AwaitStep("stage 0"));
  // A whole batch of the other slot passes meanwhile: this one waits, and not for lack of time.
  RunBatch(*session, 7, 2, 1);
  EXPECT_EQ(engine_->Count("dispatch 0"), 0);
  session->Send(DispatchTriggerMessage(7, 1));
  const v1::WorkerMessage phase = session->Next();
  ASSERT_TRUE(phase.has_phase_done()) << phase.DebugString();
  EXPECT_EQ(phase.phase_done().phase(), v1::PHASE_DISPATCH);
  EXPECT_EQ(phase.phase_done().batch(), 1u);
  RunBatch(*session, 7, 3, 1);
  EXPECT_EQ(engine_->Count("combine 0"), 0);
  session->Send(CombineTriggerMessage(7, 1));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), 0) << done.batch_done().message();
}

TEST_F(WorkerTest, UnroutedShardReportsCountsAndWaitsForTheMatrix) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  session->Send(ShardMessage(7, 1, 0, Routing::kByWorker));
  const v1::WorkerMessage counts = session->Next();
  ASSERT_TRUE(counts.has_counts()) << counts.DebugString();
  EXPECT_THAT(counts.counts().rows_to_rank(), ElementsAre(3, 0));
  EXPECT_THAT(counts.counts().rows_per_expert(), ElementsAre(3, 0, 0, 0, 0, 0, 0, 0));
  RunBatch(*session, 7, 2, 1);
  EXPECT_EQ(engine_->Count("dispatch 0"), 0);
  session->Send(CountMatrixMessage(7, 1));
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), 0) << done.batch_done().message();
  EXPECT_EQ(done.batch_done().output(), ShardRows(1));
}

TEST_F(WorkerTest, TwoSlotsRunAtOnce) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  engine_->Hold("experts 0");
  engine_->Hold("experts 1");
  session->Send(ShardMessage(7, 1, 0));
  session->Send(ShardMessage(7, 2, 1));
  ASSERT_TRUE(engine_->AwaitStep("experts 0"));
  ASSERT_TRUE(engine_->AwaitStep("experts 1"));
  engine_->Release("experts 1");
  v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done());
  EXPECT_EQ(done.batch_done().batch(), 2u);
  engine_->Release("experts 0");
  done = session->Next();
  ASSERT_TRUE(done.has_batch_done());
  EXPECT_EQ(done.batch_done().batch(), 1u);
  EXPECT_EQ(done.batch_done().output(), ShardRows(1));
}

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
  StopCoordinator();
  ASSERT_TRUE(engine_->AwaitStep("close"));
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));  // Lets the back-off grow.
  const auto restarted = std::chrono::steady_clock::now();
  StartCoordinator();
  session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  EXPECT_LT(std::chrono::steady_clock::now() - restarted, std::chrono::seconds(2));
  EXPECT_EQ(engine_->Count("load"), 1);
}

TEST_F(WorkerTest, WorkerStartedBeforeItsCoordinatorJoinsOnceItIsThere) {
  StartWorker();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // Some attempts fail first.
  StartCoordinator();
  EXPECT_NE(GreetAndLoad(), nullptr);
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

TEST_F(WorkerTest, RejectedWorkerEndsWithTheCoordinatorsMessage) {
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(RejectedMessage("hello: cluster_id test is not prod"));
  const absl::Status status = AwaitExit();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cluster_id test is not prod"));
}

TEST_F(WorkerTest, StandbyWorkerLoadsOnceItIsAssigned) {
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(StandbyMessage());
  ASSERT_TRUE(session->AwaitHeartbeats(2));
  EXPECT_EQ(engine_->Count("load"), 0);
  session->Send(AssignmentMessage());
  EXPECT_TRUE(session->Next().has_loaded());
  EXPECT_EQ(engine_->Count("load"), 1);
}

TEST_F(WorkerTest, HeartbeatsGoOnWhileWeightsLoad) {
  engine_->Hold("load");
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(AssignmentMessage());
  ASSERT_TRUE(engine_->AwaitStep("load"));
  EXPECT_TRUE(session->AwaitHeartbeats(4));
  engine_->Release("load");
  EXPECT_TRUE(session->Next().has_loaded());
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

TEST_F(WorkerTest, LeavingWorkerFinishesItsBatchesAndGoesWhenItIsToldTo) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  engine_->Hold("experts 0");
  session->Send(ShardMessage(7, 1));
  ASSERT_TRUE(engine_->AwaitStep("experts 0"));
  worker_->RequestLeave("SIGTERM");
  const v1::WorkerMessage leaving = session->Next();
  ASSERT_TRUE(leaving.has_leaving()) << leaving.DebugString();
  EXPECT_EQ(leaving.leaving().reason(), "SIGTERM");
  RunBatch(*session, 7, 2, 1);  // What was accepted before still runs.
  session->Send(ShutdownMessage());
  engine_->Release("experts 0");
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), 0);
  EXPECT_TRUE(AwaitExit().ok());
  EXPECT_EQ(engine_->Count("close"), 1);
}

TEST_F(WorkerTest, ShutdownEndsTheWorkerWithLeave) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  session->Send(ShutdownMessage());
  EXPECT_TRUE(session->Next().has_leaving());
  EXPECT_TRUE(AwaitExit().ok());
}

TEST_F(WorkerTest, LeavingWorkerWaitsForTheCoordinatorOnlySoLong) {
  config_.leave_timeout = absl::Milliseconds(50);
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  worker_->RequestLeave("SIGTERM");
  EXPECT_TRUE(session->Next().has_leaving());
  EXPECT_TRUE(AwaitExit().ok());
}

TEST_F(WorkerTest, WorkerWithoutACoordinatorLeavesAtOnce) {
  StartWorker();
  worker_->RequestLeave("SIGINT");
  EXPECT_TRUE(AwaitExit().ok());
}

TEST_F(WorkerTest, LeavingWorkerWhoseStreamEndsIsGone) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  worker_->RequestLeave("SIGTERM");
  EXPECT_TRUE(session->Next().has_leaving());
  session->Break();
  EXPECT_TRUE(AwaitExit().ok());
  EXPECT_EQ(engine_->Count("close"), 1);
}

}  // namespace
}  // namespace epserve::worker
