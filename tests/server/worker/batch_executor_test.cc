// The executor alone, with a fake engine and a recording reporter.
#include "server/worker/batch_executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/server/worker/fake_engine.h"
#include "tests/server/worker/region_server_fixture.h"

namespace epserve::worker {
namespace {

using testing::HasSubstr;

constexpr std::uint64_t kEpoch = 7;
constexpr int kTokens = 2;

class RecordingReporter : public BatchReporter {
 public:
  void Report(WorkerMessage message) override {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(std::move(message));
    changed_.notify_all();
  }
  void OnLeaseExpired(std::uint64_t epoch) override {
    std::lock_guard<std::mutex> lock(mutex_);
    expired_epoch_ = epoch;
    changed_.notify_all();
  }

  template <typename Message>
  Message Next() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(10), [&] { return !messages_.empty(); })) {
      ADD_FAILURE() << "nothing was reported";
      return {};
    }
    WorkerMessage message = std::move(messages_.front());
    messages_.pop_front();
    if (auto* expected = std::get_if<Message>(&message)) return std::move(*expected);
    ADD_FAILURE() << "another kind of message: " << message.index();
    return {};
  }
  bool empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    return messages_.empty();
  }
  bool AwaitExpired(std::uint64_t epoch) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10),
                             [&] { return expired_epoch_ == epoch; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<WorkerMessage> messages_;
  std::uint64_t expired_epoch_ = 0;
};

Shard MakeShard(std::uint64_t batch, int slot = 0) {
  Shard shard{.epoch = kEpoch, .batch = batch, .slot = slot, .layer = FakeEngine::kFirstLayer};
  shard.num_tokens = kTokens;
  shard.topk = FakeEngine::kTopk;
  shard.hidden.assign(kTokens * FakeEngine::kHidden * sizeof(float), 'x');
  shard.routed = true;
  const std::vector<std::int32_t> ids = {0, 5, 0, 5};
  shard.topk_ids.assign(reinterpret_cast<const char*>(ids.data()), ids.size() * 4);
  shard.topk_weights.assign(ids.size() * 4, '\0');
  shard.counts = runtime::CountMatrix{.num_ranks = 2,
                                      .rows = {0, 0, kTokens, kTokens},
                                      .rows_per_expert = {2, 0, 0, 0, 0, 2, 0, 0}};
  return shard;
}

class BatchExecutorTest : public testing::Test {
 protected:
  void Start(absl::Duration trigger_timeout = absl::Seconds(30)) {
    placement_ = runtime::EvenPlacement(FakeEngine::kExperts, 2);
    ASSERT_TRUE(engine_.LoadExperts(placement_, 1, [](auto, auto) {}).ok());
    ASSERT_TRUE(engine_.CreateHeap(kEpoch).ok());
    lease_.Enter(kEpoch);
    lease_.Renew(kEpoch, 0, 1000);
    executor_ = std::make_unique<BatchExecutor>(
        BatchExecutor::Config{.num_slots = 2,
                              .max_batch_tokens = 16,
                              .trigger_timeout = trigger_timeout,
                              .now_us = [this] { return now_us_.load(); }},
        &engine_, &lease_, &reporter_);
    executor_->OpenEpoch(kEpoch, placement_, 1, arena_, regions_);
  }
  void Serve(absl::Duration trigger_timeout = absl::Seconds(30)) {
    Start(trigger_timeout);
    executor_->StartEpoch(kEpoch);
  }
  // Submits and expects to be refused with `code` and a message that has `text`.
  void ExpectRefused(Shard shard, absl::StatusCode code, const std::string& text) {
    executor_->Submit(std::move(shard));
    const auto done = reporter_.Next<BatchDone>();
    EXPECT_EQ(done.status.code(), code) << done.status;
    EXPECT_THAT(std::string(done.status.message()), HasSubstr(text));
    EXPECT_TRUE(done.output.empty());
  }

  FakeEngine engine_;
  Lease lease_;
  RecordingReporter reporter_;
  runtime::Placement placement_;
  std::shared_ptr<runtime::RowArena> arena_;
  std::shared_ptr<RegionFiles> regions_;
  std::atomic<std::int64_t> now_us_ = 1;
  std::unique_ptr<BatchExecutor> executor_;
};

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

runtime::RowArenaSpec ArenaSpec() {
  runtime::RowArenaSpec spec;
  spec.cluster_id = absl::StrCat("executor-test-", ::getpid());
  spec.epoch = kEpoch;
  spec.num_slots = 2;
  spec.max_batch_tokens = 16;
  spec.hidden = FakeEngine::kHidden;
  spec.topk = FakeEngine::kTopk;
  return spec;
}

// The shard of MakeShard with its tensors in the arena, from `first_row` on.
Shard MoveToArena(Shard shard, std::int64_t first_row, runtime::RowArena* arena) {
  if (arena != nullptr) {
    const std::int64_t row_bytes = FakeEngine::kHidden * sizeof(float);
    std::memcpy(arena->rows(shard.slot) + first_row * row_bytes, shard.hidden.data(),
                shard.hidden.size());
    std::memcpy(arena->topk_ids(shard.slot) + first_row * shard.topk, shard.topk_ids.data(),
                shard.topk_ids.size());
    std::memcpy(arena->topk_weights(shard.slot) + first_row * shard.topk, shard.topk_weights.data(),
                shard.topk_weights.size());
  }
  shard.hidden.clear();
  shard.topk_ids.clear();
  shard.topk_weights.clear();
  shard.in_arena = true;
  shard.first_row = first_row;
  return shard;
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
  const auto* rows = reinterpret_cast<const char*>(arena_->rows(1));
  const std::size_t row_bytes = FakeEngine::kHidden * sizeof(float);
  EXPECT_EQ(std::string(rows + 5 * row_bytes, kTokens * row_bytes), MakeShard(1).hidden);
}

class BatchExecutorRegionTest : public BatchExecutorTest {
 protected:
  static constexpr std::size_t kRowBytes = FakeEngine::kHidden * sizeof(float);

  void SetUp() override {
    auto arena = runtime::RowArena::Create(ArenaSpec());
    ASSERT_TRUE(arena.ok()) << arena.status();
    arena_ = *std::move(arena);
    regions_ = RegionFiles::Connect(server_.address(), FakeRegionServer::kSecret);
    ASSERT_NE(regions_, nullptr);
    server_.Add(1, std::string(kRowBytes, 'a') + std::string(kRowBytes, 'b'));
    server_.Add(2, std::string(3 * kRowBytes, '.'));
  }

  // Row 0 comes from the second row of region 1, row 1 from the arena; row 0 goes to the second row
  // of region 2.
  Shard MakeRegionShard(std::uint64_t batch) {
    Shard shard = MoveToArena(MakeShard(batch), 0, arena_.get());
    shard.sources = {{1, "'one'", kRowBytes, 0, 1}};
    shard.targets = {{2, "'two'", kRowBytes, 0, 1}};
    return shard;
  }

  FakeRegionServer server_;
};

TEST_F(BatchExecutorRegionTest, RowsComeFromARegionAndGoToOne) {
  Serve();
  executor_->Submit(MakeRegionShard(1));
  const auto done = reporter_.Next<BatchDone>();
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_TRUE(done.region_faults.empty());
  EXPECT_EQ(server_.Content(2), std::string(kRowBytes, '.') + std::string(kRowBytes, 'b') +
                                    std::string(kRowBytes, '.'));
  const auto* rows = reinterpret_cast<const char*>(arena_->rows(0));
  EXPECT_EQ(std::string(rows + kRowBytes, kRowBytes), std::string(kRowBytes, 'x'));
}

TEST_F(BatchExecutorRegionTest, ShardThatGoesWhollyToRegionsIsWrittenFromWhereTheEngineHasIt) {
  Serve();
  engine_.set_combined(std::string(kRowBytes, '1') + std::string(kRowBytes, '2'));
  Shard shard = MakeRegionShard(1);
  shard.targets = {{2, "'two'", 2 * kRowBytes, 0, 1}, {2, "'two'", 0, 1, 1}};
  executor_->Submit(std::move(shard));
  const auto done = reporter_.Next<BatchDone>();
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_EQ(server_.Content(2), std::string(kRowBytes, '2') + std::string(kRowBytes, '.') +
                                    std::string(kRowBytes, '1'));
  // A shard of which a row is left in the arena goes through it.
  executor_->Submit(MakeRegionShard(2));
  ASSERT_TRUE(reporter_.Next<BatchDone>().status.ok());
  EXPECT_EQ(server_.Content(2), std::string(kRowBytes, '2') + std::string(kRowBytes, 'b') +
                                    std::string(kRowBytes, '1'));
  EXPECT_TRUE(engine_.violations().empty());
}

TEST_F(BatchExecutorRegionTest, TruncatedRegionIsAFaultOfItsRowsAndTheBatchIsWhole) {
  Serve();
  server_.Truncate(1, 0);
  executor_->Submit(MakeRegionShard(1));
  const auto done = reporter_.Next<BatchDone>();
  ASSERT_TRUE(done.status.ok()) << done.status;
  ASSERT_EQ(done.region_faults.size(), 1u);
  EXPECT_EQ(done.region_faults[0].first_row, 0);
  EXPECT_EQ(server_.Content(2), std::string(3 * kRowBytes, '.'));
}

TEST_F(BatchExecutorRegionTest, NothingIsWrittenOnceTheLeaseHasRunOut) {
  Serve();
  engine_.Hold("finish 0");
  executor_->Submit(MakeRegionShard(1));
  ASSERT_TRUE(engine_.AwaitStep("finish 0"));
  now_us_ = 1001;  // Past the lease, which combine has still seen fresh.
  engine_.Release("finish 0");
  EXPECT_EQ(reporter_.Next<BatchDone>().status.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(reporter_.AwaitExpired(kEpoch));
  EXPECT_EQ(server_.Content(2), std::string(3 * kRowBytes, '.'));
}

TEST_F(BatchExecutorRegionTest, NothingIsWrittenOnceTheEpochHasEnded) {
  Serve();
  engine_.Hold("finish 0");
  executor_->Submit(MakeRegionShard(1));
  ASSERT_TRUE(engine_.AwaitStep("finish 0"));
  executor_->AbortEpoch(kEpoch);
  engine_.Release("finish 0");
  executor_->Drain();
  EXPECT_EQ(server_.Content(2), std::string(3 * kRowBytes, '.'));
}

TEST_F(BatchExecutorRegionTest, RowsOutsideTheShardOrTheFileAreRefused) {
  Serve();
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const std::uint64_t half = std::uint64_t{1} << 63;
  std::uint64_t batch = 0;
  for (const RegionRows& rows : std::vector<RegionRows>{{1, "'one'", 0, 0, 3},
                                                        {1, "'one'", 0, 1, 2},
                                                        {1, "'one'", 0, -1, 1},
                                                        {1, "'one'", 0, 0, -1},
                                                        {1, "'one'", 0, INT64_MAX, 1},
                                                        {1, "'one'", half, 0, 1},
                                                        {1, "'one'", half - kRowBytes, 0, 1},
                                                        {1, "'one'", UINT64_MAX, 0, 1}}) {
    Shard shard = MakeRegionShard(++batch);
    shard.sources = {rows};
    ExpectRefused(shard, kInvalid, "region 'one'");
    shard = MakeRegionShard(++batch);
    shard.targets = {rows};
    ExpectRefused(shard, kInvalid, "region 'one'");
  }
  Shard apart = MakeShard(++batch);
  apart.sources = {{1, "'one'", 0, 0, 1}};
  ExpectRefused(apart, absl::StatusCode::kInternal, "cannot reach any");
  EXPECT_EQ(engine_.Count("stage 0"), 0);
}

TEST_F(BatchExecutorRegionTest, ForgottenRegionIsClosed) {
  Serve();
  executor_->Submit(MakeRegionShard(1));
  ASSERT_TRUE(reporter_.Next<BatchDone>().status.ok());
  EXPECT_EQ(regions_->num_open(), 2u);
  executor_->Forget({{1, 2}});
  EXPECT_EQ(regions_->num_open(), 0u);
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
  EXPECT_TRUE(executor_->RefuseWhenIdle(absl::Seconds(10)));
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
