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
  expect_elsewhere(2, [](Shard* shard) { shard->counts.reset(); });
  expect_elsewhere(3, [](Shard* shard) { shard->counts->rows[0] = 17; });
  expect_elsewhere(4, [](Shard* shard) { shard->num_tokens = 17; });
  expect_elsewhere(5, [](Shard* shard) { shard->targets.push_back({}); });
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
