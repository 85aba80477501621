// The daemon as a whole, over real gRPC, against a scripted coordinator and a fake engine.
#include "server/worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/symmetric/row_arena.h"
#include "server/common/probe.h"
#include "tests/server/worker/worker_harness.h"

namespace epserve::worker {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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
  EXPECT_EQ(hello.num_slots(), 2);
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
  EXPECT_EQ(created.heap_created().handle_type(), "fake");
  EXPECT_FALSE(created.heap_created().takes_shared_batches()) << "there is no arena";

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

class WorkerArenaTest : public WorkerTest, public testing::WithParamInterface<bool> {};
INSTANTIATE_TEST_SUITE_P(TakesSharedBatches, WorkerArenaTest, testing::Bool());

TEST_P(WorkerArenaTest, TakesSharedBatchesWhereItsEngineDoes) {
  auto arena = runtime::RowArena::Create({.cluster_id = "test",
                                          .epoch = 7,
                                          .num_slots = 2,
                                          .max_batch_tokens = 16,
                                          .hidden = FakeEngine::kHidden,
                                          .topk = FakeEngine::kTopk});
  ASSERT_TRUE(arena.ok()) << arena.status();
  engine_->set_takes_shared_batches(GetParam());
  StartCoordinator();
  StartWorker();
  const std::shared_ptr<ControlSession> session = GreetAndLoad();
  ASSERT_NE(session, nullptr);
  v1::CoordinatorMessage message = CreateHeapMessage(7);
  message.mutable_create_heap()->set_row_arena((*arena)->handle());
  session->Send(message);
  const v1::WorkerMessage created = session->Next();
  ASSERT_TRUE(created.has_heap_created()) << created.DebugString();
  EXPECT_TRUE(created.heap_created().row_arena_mapped());
  EXPECT_EQ(created.heap_created().takes_shared_batches(), GetParam());
}

TEST_F(WorkerTest, BatchesThatAreParkedForTheirMatrixGoThroughOneAfterAnother) {
  engine_->set_runs_on_any_thread(true);
  const std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  for (std::uint64_t batch = 1; batch <= 20; ++batch) {
    session->Send(ShardMessage(7, batch, 0, Routing::kByWorker));
    const v1::WorkerMessage counts = session->Next();
    ASSERT_TRUE(counts.has_counts()) << counts.DebugString();
    session->Send(CountMatrixMessage(7, batch));
    const v1::WorkerMessage done = session->Next();
    ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
    EXPECT_EQ(done.batch_done().code(), 0) << done.batch_done().message();
    EXPECT_EQ(done.batch_done().output(), ShardRows(batch));
  }
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

TEST_F(WorkerTest, HelloSaysWhetherTheRanksCanExchangeCounts) {
  StartCoordinator();
  engine_->set_exchanges_counts(false);
  StartWorker();
  v1::Hello hello;
  ASSERT_NE(Greet(&hello), nullptr);
  EXPECT_FALSE(hello.device_counts());
}

TEST_F(WorkerTest, ShardThatTheRanksCountNeedsNoWordOfTheCoordinator) {
  std::shared_ptr<ControlSession> session = Serve(7);
  ASSERT_NE(session, nullptr);
  v1::CoordinatorMessage shard = ShardMessage(7, 1, 0, Routing::kByWorker);
  shard.mutable_shard()->set_device_counts(true);
  session->Send(shard);
  const v1::WorkerMessage done = session->Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().code(), 0) << done.batch_done().message();
  EXPECT_GT(done.batch_done().times().counts_ns(), 0);
  EXPECT_EQ(done.batch_done().output(), ShardRows(1));
  EXPECT_EQ(engine_->Count("counts 0"), 1);
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

TEST_F(WorkerTest, WorkerStartedBeforeItsCoordinatorJoinsOnceItIsThere) {
  StartWorker();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // Some attempts fail first.
  StartCoordinator();
  EXPECT_NE(GreetAndLoad(), nullptr);
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

TEST_F(WorkerTest, ReadinessIsToldAsTheWorkerJoinsLoadsAndLosesItsStream) {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<bool> told;
  config_.on_ready = [&](bool ready) {
    const std::lock_guard lock(mutex);
    told.push_back(ready);
    changed.notify_all();
  };
  const auto await = [&](const std::vector<bool>& wanted) {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, std::chrono::seconds(60), [&] { return told.size() >= wanted.size(); });
    EXPECT_EQ(told, wanted);
  };
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(StandbyMessage());
  await({true});
  engine_->Hold("load");
  session->Send(AssignmentMessage());
  ASSERT_TRUE(engine_->AwaitStep("load"));
  await({true, false});
  engine_->Release("load");
  EXPECT_TRUE(session->Next().has_loaded());
  await({true, false, true});
  FormEpoch(*session, 7);
  session->Break();
  await({true, false, true, false});  // Ready all through the epoch.
  session = Greet();
  ASSERT_NE(session, nullptr);
  session->Send(AssignmentMessage());
  EXPECT_TRUE(session->Next().has_loaded());
  await({true, false, true, false, true});
  worker_->RequestLeave("SIGTERM");
  await({true, false, true, false, true, false});
  session->Send(ShutdownMessage());
  EXPECT_TRUE(AwaitExit().ok());
  EXPECT_EQ(told.size(), 6u);
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
  config_.leave_timeout = absl::Seconds(1);
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
