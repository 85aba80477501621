// The executor with a fake engine and a recording reporter.
#ifndef EPSERVE_TESTS_SERVER_WORKER_BATCH_EXECUTOR_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_WORKER_BATCH_EXECUTOR_FIXTURE_H_

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
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/worker/batch_executor.h"
#include "tests/server/worker/fake_engine.h"

namespace epserve::worker {

inline constexpr std::uint64_t kEpoch = 7;
inline constexpr int kTokens = 2;

class RecordingReporter : public BatchReporter {
 public:
  void Report(WorkerMessage message) override {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(std::move(message));
    reported_by_ = std::this_thread::get_id();
    changed_.notify_all();
  }
  void OnLeaseExpired(std::uint64_t epoch) override {
    std::lock_guard<std::mutex> lock(mutex_);
    expired_epoch_ = epoch;
    changed_.notify_all();
  }

  WorkerMessage NextOfAny() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(60), [&] { return !messages_.empty(); })) {
      ADD_FAILURE() << "nothing was reported";
      return BatchDone{};
    }
    WorkerMessage message = std::move(messages_.front());
    messages_.pop_front();
    return message;
  }
  template <typename Message>
  Message Next() {
    WorkerMessage message = NextOfAny();
    if (auto* expected = std::get_if<Message>(&message)) return std::move(*expected);
    ADD_FAILURE() << "another kind of message: " << message.index();
    return {};
  }
  bool empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    return messages_.empty();
  }
  // The thread of the last report.
  std::thread::id reported_by() {
    std::lock_guard<std::mutex> lock(mutex_);
    return reported_by_;
  }
  bool AwaitExpired(std::uint64_t epoch) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(60),
                             [&] { return expired_epoch_ == epoch; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<WorkerMessage> messages_;
  std::thread::id reported_by_;
  std::uint64_t expired_epoch_ = 0;
};

inline Shard MakeShard(std::uint64_t batch, int slot = 0) {
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
    executor_->OpenEpoch(kEpoch, placement_, 1, arena_, regions_, device_regions_);
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
    EXPECT_THAT(std::string(done.status.message()), testing::HasSubstr(text));
    EXPECT_TRUE(done.output.empty());
  }

  FakeEngine engine_;
  Lease lease_;
  RecordingReporter reporter_;
  runtime::Placement placement_;
  std::shared_ptr<runtime::RowArena> arena_;
  std::shared_ptr<RegionFiles> regions_;
  std::shared_ptr<OpenDeviceRegions> device_regions_;
  std::atomic<std::int64_t> now_us_ = 1;
  std::unique_ptr<BatchExecutor> executor_;
};

inline runtime::RowArenaSpec ArenaSpec() {
  runtime::RowArenaSpec spec;
  spec.cluster_id = absl::StrCat("executor-test-", ::getpid());
  spec.epoch = kEpoch;
  spec.num_slots = 2;
  spec.max_batch_tokens = 16;
  spec.hidden = FakeEngine::kHidden;
  spec.topk = FakeEngine::kTopk;
  return spec;
}

// The rows of a slot's batches.
inline int BlockOf(int slot) { return 4 - 2 * slot; }

// The shard of MakeShard with its tensors in the arena, from `first_row` on.
inline Shard MoveToArena(Shard shard, std::int64_t first_row, runtime::RowArena* arena) {
  shard.row_block = BlockOf(shard.slot);
  if (arena != nullptr) {
    const std::int64_t row_bytes = FakeEngine::kHidden * sizeof(float);
    std::memcpy(arena->rows(shard.row_block) + first_row * row_bytes, shard.hidden.data(),
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

}  // namespace epserve::worker

#endif  // EPSERVE_TESTS_SERVER_WORKER_BATCH_EXECUTOR_FIXTURE_H_
