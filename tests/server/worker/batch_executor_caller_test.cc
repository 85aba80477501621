// Which batches run in the thread that brings them, and what goes on meanwhile.
#include <functional>
#include <thread>

#include "tests/server/worker/batch_executor_fixture.h"

namespace epserve::worker {
namespace {

class BatchInCallersThreadTest : public BatchExecutorTest {
 protected:
  BatchInCallersThreadTest() { engine_.set_runs_on_any_thread(true); }
};

TEST_F(BatchInCallersThreadTest, SmallBatchIsDoneWhenSubmitReturns) {
  Serve();
  for (std::uint64_t batch = 1; batch <= 3; ++batch) {
    executor_->Submit(MakeShard(batch));
    ASSERT_FALSE(reporter_.empty());
    EXPECT_EQ(reporter_.Next<BatchDone>().batch, batch);
    EXPECT_EQ(reporter_.reported_by(), std::this_thread::get_id());
    EXPECT_EQ(executor_->batches_done(), batch);
  }
}

TEST_F(BatchInCallersThreadTest, WhatIsLargeOrWaitsForTheCoordinatorRunsInItsSlotsThread) {
  const auto expect_elsewhere = [this](std::uint64_t batch,
                                       const std::function<void(Shard*)>& change) {
    SCOPED_TRACE(batch);
    Shard shard = MakeShard(batch);
    const runtime::CountMatrix counts = *shard.counts;
    change(&shard);
    executor_->Submit(std::move(shard));
    executor_->SetCounts({.epoch = kEpoch, .batch = batch, .counts = counts});
    executor_->Trigger(DispatchTrigger{kEpoch, batch});
    executor_->Trigger(CombineTrigger{kEpoch, batch});
    while (!std::holds_alternative<BatchDone>(reporter_.NextOfAny())) {
    }
    EXPECT_NE(reporter_.reported_by(), std::this_thread::get_id());
    while (executor_->batches_done() < batch) std::this_thread::yield();
  };
  Serve();
  expect_elsewhere(1, [](Shard* shard) { shard->separate_triggers = true; });
  expect_elsewhere(2, [](Shard* shard) {
    shard->counts.reset();
    shard->separate_triggers = true;
  });
  expect_elsewhere(3, [](Shard* shard) { shard->counts->rows = {33, 0, 32, 0}; });
  expect_elsewhere(4, [](Shard* shard) { shard->num_tokens = 65; });
  expect_elsewhere(5, [](Shard* shard) { shard->targets.push_back({}); });
}

TEST_F(BatchInCallersThreadTest, SmallBatchWhoseRanksCountAmongThemselvesIsDoneWhenSubmitReturns) {
  Serve();
  Shard shard = MakeShard(1);
  shard.counts.reset();
  shard.device_counts = true;
  executor_->Submit(std::move(shard));
  ASSERT_FALSE(reporter_.empty());
  EXPECT_TRUE(reporter_.Next<BatchDone>().status.ok());
  EXPECT_EQ(reporter_.reported_by(), std::this_thread::get_id());
}

// A small batch that owes its count matrix to the coordinator.
class ParkedBatchTest : public BatchInCallersThreadTest {
 protected:
  // Its counts are told when this returns.
  void Park(std::uint64_t batch = 1) {
    Shard shard = MakeShard(batch);
    counts_ = *shard.counts;
    shard.counts.reset();
    executor_->Submit(std::move(shard));
    ASSERT_FALSE(reporter_.empty());
    const auto counts = reporter_.Next<CountsReport>();
    EXPECT_EQ(counts.batch, batch);
    EXPECT_EQ(counts.counts.rows_to_rank, (std::vector<std::int32_t>{kTokens, kTokens}));
    EXPECT_EQ(reporter_.reported_by(), std::this_thread::get_id());
  }
  void SetCounts(std::uint64_t batch = 1) {
    executor_->SetCounts({.epoch = kEpoch, .batch = batch, .counts = counts_});
  }

  runtime::CountMatrix counts_;
};

TEST_F(ParkedBatchTest, IsStagedAndLeftAndEndedByWhoeverBringsTheMatrix) {
  Serve();
  for (std::uint64_t batch = 1; batch <= 3; ++batch) {
    Park(batch);
    EXPECT_EQ(engine_.Count("dispatch 0"), static_cast<int>(batch) - 1);
    SetCounts(batch);
    ASSERT_FALSE(reporter_.empty());
    const auto done = reporter_.Next<BatchDone>();
    EXPECT_TRUE(done.status.ok()) << done.status;
    EXPECT_EQ(done.batch, batch);
    EXPECT_GT(done.times.counts_ns, 0);
    EXPECT_EQ(reporter_.reported_by(), std::this_thread::get_id());
    EXPECT_EQ(executor_->batches_done(), batch);
  }
}

TEST_F(ParkedBatchTest, GoesOnInItsSlotsThreadWhereAnotherBatchIsHeldThen) {
  Serve();
  Park();
  engine_.Hold("dispatch 1");
  executor_->Submit(MakeShard(2, 1));
  ASSERT_TRUE(engine_.AwaitStep("dispatch 1"));
  SetCounts();
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 1u);
  EXPECT_NE(reporter_.reported_by(), std::this_thread::get_id());
  engine_.Release("dispatch 1");
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 2u);
}

TEST_F(ParkedBatchTest, MatrixThatContradictsItFailsIt) {
  Serve();
  Park();
  counts_.rows[2] = 1;
  SetCounts();
  const auto done = reporter_.Next<BatchDone>();
  EXPECT_EQ(done.status.code(), absl::StatusCode::kInternal) << done.status;
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
  EXPECT_EQ(engine_.Count("discard 0"), 1);
}

TEST_F(ParkedBatchTest, ThatCannotBeStagedIsReportedAtOnceAndNotParked) {
  Serve();
  engine_.FailAt("stage 0", absl::InvalidArgumentError("stage: bad id"));
  Shard shard = MakeShard(1);
  shard.counts.reset();
  ExpectRefused(std::move(shard), absl::StatusCode::kInvalidArgument, "bad id");
  EXPECT_EQ(executor_->batches_done(), 1u);
}

TEST_F(ParkedBatchTest, EndsUnreportedWithItsEpoch) {
  Serve();
  Park();
  EXPECT_TRUE(executor_->AbortEpoch(kEpoch));
  EXPECT_EQ(engine_.Count("discard 0"), 1);
  executor_->Drain();
  SetCounts();  // Too late.
  EXPECT_TRUE(reporter_.empty());
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
}

TEST_F(ParkedBatchTest, EndsWithTheExecutor) {
  Serve();
  Park();
  executor_.reset();
  EXPECT_EQ(engine_.Count("discard 0"), 1);
  EXPECT_TRUE(reporter_.empty());
}

TEST_F(ParkedBatchTest, IsWaitedForByALeave) {
  Serve();
  Park();
  EXPECT_FALSE(executor_->RefuseWhenIdle(absl::Milliseconds(1)));
  SetCounts();
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 1u);
  EXPECT_TRUE(executor_->RefuseWhenIdle(absl::Seconds(60)));
}

TEST_F(BatchInCallersThreadTest, EngineThatIsBoundToItsThreadsKeepsThem) {
  engine_.set_runs_on_any_thread(false);
  Serve();
  executor_->Submit(MakeShard(1));
  reporter_.Next<BatchDone>();
  EXPECT_NE(reporter_.reported_by(), std::this_thread::get_id());
}

TEST_F(BatchInCallersThreadTest, MeanwhileOtherBatchesGoToTheirSlots) {
  Serve();
  engine_.Hold("dispatch 0");
  std::thread caller([&] { executor_->Submit(MakeShard(1)); });
  const std::thread::id callers_id = caller.get_id();
  ASSERT_TRUE(engine_.AwaitStep("dispatch 0"));
  executor_->Submit(MakeShard(2, 1));
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 2u);
  EXPECT_NE(reporter_.reported_by(), std::this_thread::get_id());
  executor_->Submit(MakeShard(3));  // The same slot's next.
  engine_.Release("dispatch 0");
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 1u);
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 3u);
  EXPECT_NE(reporter_.reported_by(), callers_id);
  caller.join();
}

TEST_F(BatchInCallersThreadTest, EpochsEndStopsItAndDrainWaitsForIt) {
  Serve();
  engine_.Hold("dispatch 0");
  std::thread caller([&] { executor_->Submit(MakeShard(1)); });
  ASSERT_TRUE(engine_.AwaitStep("dispatch 0"));
  EXPECT_TRUE(executor_->AbortEpoch(kEpoch));
  executor_->Drain();
  EXPECT_EQ(engine_.Count("discard 0"), 1);
  EXPECT_TRUE(reporter_.empty());
  caller.join();
}

TEST_F(BatchInCallersThreadTest, ExecutorsEndWaitsForIt) {
  Serve();
  engine_.Hold("dispatch 0");
  std::thread caller([&, executor = executor_.get()] { executor->Submit(MakeShard(1)); });
  ASSERT_TRUE(engine_.AwaitStep("dispatch 0"));
  executor_.reset();
  EXPECT_EQ(engine_.Count("discard 0"), 1);
  caller.join();
}

}  // namespace
}  // namespace epserve::worker
