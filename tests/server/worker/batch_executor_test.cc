// The executor alone: shards, triggers, leases, aborts.
#include "server/worker/batch_executor.h"

#include "tests/server/worker/batch_executor_fixture.h"

namespace epserve::worker {
namespace {

using testing::HasSubstr;

TEST_F(BatchExecutorTest, ShardsAreHeldUntilTheEpochStarts) {
  Start();
  executor_->Submit(MakeShard(1));
  EXPECT_EQ(engine_.Count("stage 0"), 0);
  executor_->StartEpoch(kEpoch + 1);  // Another epoch's start is none.
  EXPECT_EQ(engine_.Count("stage 0"), 0);
  executor_->StartEpoch(kEpoch);
  EXPECT_TRUE(reporter_.Next<BatchDone>().status.ok());
}

TEST_F(BatchExecutorTest, NextShardOfASlotIsTakenWhileItsLastIsBeingHandedIn) {
  Serve();
  engine_.Hold("finish 0");
  executor_->Submit(MakeShard(1));
  ASSERT_TRUE(engine_.AwaitStep("finish 0"));
  executor_->Submit(MakeShard(2));
  ExpectRefused(MakeShard(3), absl::StatusCode::kInternal, "slot 0 still holds batch 2");
  engine_.Release("finish 0");
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 1u);
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 2u);
}

TEST_F(BatchExecutorTest, ShardOfAnotherEpochIsDropped) {
  Serve();
  Shard old = MakeShard(1);
  old.epoch = kEpoch - 1;
  executor_->Submit(old);
  executor_->Submit(MakeShard(2));
  EXPECT_EQ(reporter_.Next<BatchDone>().batch, 2u);
  EXPECT_EQ(engine_.Count("stage 0"), 1);
}

TEST_F(BatchExecutorTest, ShardWithAWrongSizeIsRefusedBeforeTheEngineSeesIt) {
  Serve();
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Shard shard = MakeShard(1);
  shard.hidden.pop_back();
  ExpectRefused(shard, kInvalid, "hidden has 31 bytes, expected 32");
  shard = MakeShard(2);
  shard.topk_ids.push_back('x');
  ExpectRefused(shard, kInvalid, "topk_ids has 17 bytes, expected 16");
  shard = MakeShard(3);
  shard.topk_weights.clear();
  ExpectRefused(shard, kInvalid, "topk_weights has 0 bytes, expected 16");
  shard = MakeShard(4);
  shard.num_tokens = 9;  // A rank's share of 16 is 8.
  ExpectRefused(shard, kInvalid, "num_tokens 9");
  shard = MakeShard(5);
  shard.num_tokens = -1;
  ExpectRefused(shard, kInvalid, "num_tokens -1");
  shard = MakeShard(6);
  shard.topk = 17;
  ExpectRefused(shard, kInvalid, "topk 17");
  shard = MakeShard(7);
  shard.slot = 2;
  ExpectRefused(shard, kInvalid, "slot 2");
  EXPECT_EQ(engine_.Count("stage 0"), 0);
}

TEST_F(BatchExecutorTest, ShardInTheArenaIsReadAndAnsweredThere) {
  auto arena = runtime::RowArena::Create(ArenaSpec());
  ASSERT_TRUE(arena.ok()) << arena.status();
  arena_ = *std::move(arena);
  Serve();
  engine_.Hold("finish 1");
  executor_->Submit(MoveToArena(MakeShard(1, 1), 5, arena_.get()));
  ASSERT_TRUE(engine_.AwaitStep("finish 1"));
  engine_.Release("finish 1");
  const auto done = reporter_.Next<BatchDone>();
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_TRUE(done.output.empty());
  const auto* rows = reinterpret_cast<const char*>(arena_->rows(BlockOf(1)));
  const std::size_t row_bytes = FakeEngine::kHidden * sizeof(float);
  EXPECT_EQ(std::string(rows + 5 * row_bytes, kTokens * row_bytes), MakeShard(1).hidden);
}

TEST_F(BatchExecutorTest, SharedBatchIsTheEnginesFromTheArenasFirstRowOn) {
  auto arena = runtime::RowArena::Create(ArenaSpec());
  ASSERT_TRUE(arena.ok()) << arena.status();
  arena_ = *std::move(arena);
  Serve();
  Shard shard = MoveToArena(MakeShard(1, 1), 5, arena_.get());
  shard.shard_begin = {0, 5, 7};
  executor_->Submit(std::move(shard));
  const auto done = reporter_.Next<BatchDone>();
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_THAT(engine_.staged_shared().first, testing::ElementsAre(0, 5, 7));
  EXPECT_EQ(engine_.staged_shared().second, arena_->rows(BlockOf(1)));
}

TEST_F(BatchExecutorTest, SharedBatchThatIsNotAllThereIsRefused) {
  auto arena = runtime::RowArena::Create(ArenaSpec());
  ASSERT_TRUE(arena.ok()) << arena.status();
  arena_ = *std::move(arena);
  Serve();
  Shard shard = MoveToArena(MakeShard(1), 5, arena_.get());
  shard.shard_begin = {0, 4, 7};
  ExpectRefused(shard, absl::StatusCode::kInvalidArgument,
                "first_row 5 is not where the shared batch has the shard of rank 1");
  shard.shard_begin = {5};
  ExpectRefused(shard, absl::StatusCode::kInvalidArgument, "first_row 5 is not where");
  shard.shard_begin = {0, 5, 7};
  shard.routed = false;
  ExpectRefused(shard, absl::StatusCode::kInternal, "not all of its rows and ids are in the arena");
  shard.routed = true;
  shard.sources = {{1, "'one'", 0, 0, 1}};
  ExpectRefused(shard, absl::StatusCode::kInternal, "not all of its rows and ids are in the arena");
  shard.rows_follow = true;  // Which says so; without regions it is refused all the same.
  ExpectRefused(shard, absl::StatusCode::kInternal, "cannot reach any");
  shard.sources.clear();
  shard.in_arena = false;
  ExpectRefused(shard, absl::StatusCode::kInternal, "not all of its rows and ids are in the arena");
}

TEST_F(BatchExecutorTest, SharedBatchForAnEngineThatTakesNoneIsRefused) {
  engine_.set_takes_shared_batches(false);
  Serve();
  Shard shard = MakeShard(1);
  shard.shard_begin = {0, 0, 2};
  ExpectRefused(shard, absl::StatusCode::kInternal, "has not said that it takes such");
}

TEST_F(BatchExecutorTest, ShardPastTheArenaIsRefused) {
  auto arena = runtime::RowArena::Create(ArenaSpec());
  ASSERT_TRUE(arena.ok()) << arena.status();
  arena_ = *std::move(arena);
  Serve();
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(MoveToArena(MakeShard(1), 15, nullptr), kInvalid, "first_row 15 with 2 rows");
  ExpectRefused(MoveToArena(MakeShard(2), -1, nullptr), kInvalid, "first_row -1");
  ExpectRefused(MoveToArena(MakeShard(3), INT64_MAX, nullptr), kInvalid, "first_row");
  for (const int block : {-1, 6, INT32_MAX}) {
    Shard outside = MoveToArena(MakeShard(4), 0, nullptr);
    outside.row_block = block;
    ExpectRefused(outside, kInvalid, absl::StrCat("row_block ", block));
  }
  Shard wide = MoveToArena(MakeShard(4), 0, nullptr);
  wide.topk = FakeEngine::kTopk + 1;
  ExpectRefused(wide, kInvalid, "topk");
  Shard both = MoveToArena(MakeShard(5), 0, nullptr);
  both.hidden = "x";
  ExpectRefused(both, kInvalid, "hidden has 1 bytes, expected 0");
  EXPECT_EQ(engine_.Count("stage 0"), 0);
}

TEST_F(BatchExecutorTest, ShardInAnArenaThatIsNotMappedIsRefused) {
  Serve();
  ExpectRefused(MoveToArena(MakeShard(1), 0, nullptr), absl::StatusCode::kInternal, "none mapped");
}

TEST_F(BatchExecutorTest, MatrixThatContradictsTheShardIsRefusedBeforeDispatch) {
  Serve();
  Shard shard = MakeShard(1);
  shard.counts->rows[2] = 1;
  ExpectRefused(shard, absl::StatusCode::kInternal, "1 rows from rank 1 to rank 0");
  shard = MakeShard(2);
  shard.counts->rows[2] = -1;
  ExpectRefused(shard, absl::StatusCode::kInvalidArgument, "rows[1][0] -1");
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
  EXPECT_EQ(engine_.Count("discard 0"), 2);
}

TEST_F(BatchExecutorTest, MatrixThatComesDuringStagingIsUsed) {
  Serve();
  Shard shard = MakeShard(1);
  const runtime::CountMatrix counts = *shard.counts;
  shard.counts.reset();
  engine_.Hold("stage 0");
  executor_->Submit(shard);
  ASSERT_TRUE(engine_.AwaitStep("stage 0"));
  executor_->SetCounts({.epoch = kEpoch, .batch = 1, .counts = counts});
  engine_.Release("stage 0");
  reporter_.Next<CountsReport>();
  EXPECT_TRUE(reporter_.Next<BatchDone>().status.ok());
}

// A shard whose counts the ranks exchange among themselves.
Shard MakeDeviceShard(std::uint64_t batch, int slot = 0) {
  Shard shard = MakeShard(batch, slot);
  shard.counts.reset();
  shard.device_counts = true;
  return shard;
}

TEST_F(BatchExecutorTest, CountsOfADeviceShardAreExchangedAndNotReported) {
  Serve();
  executor_->Submit(MakeDeviceShard(1));
  const auto done = reporter_.Next<BatchDone>();  // The first thing that is said.
  EXPECT_TRUE(done.status.ok()) << done.status;
  EXPECT_GT(done.times.counts_ns, 0);
  const std::vector<std::string> calls = engine_.calls();
  EXPECT_THAT(std::vector<std::string>(calls.end() - 5, calls.end()),
              testing::ElementsAre("counts 0", "dispatch 0", "experts 0", "combine 0", "finish 0"));
}

TEST_F(BatchExecutorTest, MatrixSentForADeviceShardIsNotUsed) {
  Serve();
  engine_.Hold("counts 0");
  executor_->Submit(MakeDeviceShard(1));
  ASSERT_TRUE(engine_.AwaitStep("counts 0"));
  executor_->SetCounts({.epoch = kEpoch, .batch = 1, .counts = {}});  // It would be refused.
  engine_.Release("counts 0");
  EXPECT_TRUE(reporter_.Next<BatchDone>().status.ok());
}

TEST_F(BatchExecutorTest, DeviceShardWithAMatrixIsRefused) {
  Serve();
  Shard both = MakeShard(1);
  both.device_counts = true;
  ExpectRefused(both, absl::StatusCode::kInvalidArgument, "a count matrix came");
  EXPECT_EQ(engine_.Count("stage 0"), 0);
}

TEST_F(BatchExecutorTest, DeviceShardForAnEngineThatCannotExchangeCountsIsUnimplemented) {
  engine_.set_exchanges_counts(false);
  Serve();
  ExpectRefused(MakeDeviceShard(1), absl::StatusCode::kUnimplemented,
                "ranks of the host backend cannot; give the coordinator --count-exchange=");
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
}

TEST_F(BatchExecutorTest, PeerTimeoutInTheCountExchangeIsReportedWithItsMessage) {
  Serve();
  engine_.FailAt("counts 0", absl::DeadlineExceededError("counts: rank 1 waited for rank 0"));
  ExpectRefused(MakeDeviceShard(1), absl::StatusCode::kDeadlineExceeded,
                "rank 1 waited for rank 0");
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
  EXPECT_EQ(engine_.Count("discard 0"), 1);
}

TEST_F(BatchExecutorTest, WithoutALeaseNoPeerIsToldTheCounts) {
  Serve();
  now_us_ = 1000;
  ExpectRefused(MakeDeviceShard(1), absl::StatusCode::kAborted, "counts: the worker has no lease");
  EXPECT_EQ(engine_.Count("counts 0"), 0);
}

TEST_F(BatchExecutorTest, AbortEndsACountExchange) {
  Serve();
  engine_.Hold("counts 0");
  executor_->Submit(MakeDeviceShard(1));
  ASSERT_TRUE(engine_.AwaitStep("counts 0"));
  EXPECT_TRUE(executor_->AbortEpoch(kEpoch));
  executor_->Drain();
  EXPECT_TRUE(reporter_.empty());
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
}

TEST_F(BatchExecutorTest, TriggerThatNeverComesEndsTheBatchWithDeadlineExceeded) {
  Serve(absl::Milliseconds(20));
  Shard shard = MakeShard(1);
  shard.separate_triggers = true;
  ExpectRefused(shard, absl::StatusCode::kDeadlineExceeded, "dispatch trigger did not come");
}

TEST_F(BatchExecutorTest, AbortEndsWaitsOfEverySlotAndNothingIsReported) {
  Serve();
  engine_.Hold("dispatch 0");
  executor_->Submit(MakeShard(1));
  Shard waiting = MakeShard(2, 1);
  waiting.separate_triggers = true;
  executor_->Submit(waiting);
  ASSERT_TRUE(engine_.AwaitStep("dispatch 0"));
  ASSERT_TRUE(engine_.AwaitStep("stage 1"));
  EXPECT_FALSE(executor_->AbortEpoch(kEpoch - 1));
  EXPECT_EQ(engine_.Count("abort"), 0);
  EXPECT_TRUE(executor_->AbortEpoch(kEpoch));
  executor_->Drain();
  EXPECT_TRUE(reporter_.empty());
  EXPECT_EQ(engine_.Count("discard 0"), 1);
  EXPECT_EQ(engine_.Count("discard 1"), 1);
}

TEST_F(BatchExecutorTest, PeerTimeoutIsReportedWithItsMessage) {
  Serve();
  engine_.FailAt("dispatch 0", absl::DeadlineExceededError("dispatch: rank 1 waited for rank 0"));
  ExpectRefused(MakeShard(1), absl::StatusCode::kDeadlineExceeded, "rank 1 waited for rank 0");
}

TEST_F(BatchExecutorTest, ExpiredLeaseFailsTheBatchAndAbortsTheEpoch) {
  Serve();
  now_us_ = 1000;
  ExpectRefused(MakeShard(1), absl::StatusCode::kAborted, "it ran out 0 ms ago");
  EXPECT_TRUE(reporter_.AwaitExpired(kEpoch));
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
  EXPECT_EQ(engine_.Count("abort"), 1);
  executor_->Submit(MakeShard(2));
  executor_->Drain();
  EXPECT_TRUE(reporter_.empty());
}

TEST_F(BatchExecutorTest, RefusingWaitsForWhatRunsAndRefusesWhatComes) {
  Serve();
  engine_.Hold("experts 0");
  executor_->Submit(MakeShard(1));
  ASSERT_TRUE(engine_.AwaitStep("experts 0"));
  EXPECT_FALSE(executor_->RefuseWhenIdle(absl::Milliseconds(1)));
  ExpectRefused(MakeShard(2, 1), absl::StatusCode::kUnavailable, "leaving");
  engine_.Release("experts 0");
  EXPECT_TRUE(reporter_.Next<BatchDone>().status.ok());
  EXPECT_TRUE(executor_->RefuseWhenIdle(absl::Seconds(60)));
}

TEST_F(BatchExecutorTest, EmptyShardIsOrdinary) {
  Serve();
  Shard shard = MakeShard(1);
  shard.num_tokens = 0;
  shard.hidden.clear();
  shard.topk_ids.clear();
  shard.topk_weights.clear();
  shard.counts->rows = {0, 0, 0, 0};
  executor_->Submit(shard);
  const auto done = reporter_.Next<BatchDone>();
  EXPECT_TRUE(done.status.ok()) << done.status;
  EXPECT_TRUE(done.output.empty());
}

}  // namespace
}  // namespace epserve::worker
