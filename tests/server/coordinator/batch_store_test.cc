#include "server/coordinator/batch_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "tests/server/coordinator/batch_store_fixture.h"
#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(BatchStoreTest, ShardsCutAcrossRequests) {
  const std::vector<ShardMessage> shards = Start();
  ASSERT_EQ(shards.size(), 2u);
  EXPECT_EQ(shards[0].slot, 1);
  EXPECT_EQ(shards[0].layer, 3);
  EXPECT_THAT(Unpack<float>(shards[0].hidden), ElementsAre(0, 1, 10, 11));
  EXPECT_THAT(Unpack<std::int32_t>(shards[0].topk_ids), ElementsAre(0, 1, 2, -1));
  EXPECT_THAT(Unpack<float>(shards[1].hidden), ElementsAre(20, 21, 30, 31));
  EXPECT_THAT(Unpack<std::int32_t>(shards[1].topk_ids), ElementsAre(3, 3, 1, 2));
  EXPECT_THAT(Unpack<float>(shards[1].topk_weights), ElementsAre(5, 6, 7, 8));
}

TEST_F(BatchStoreTest, MatrixCountsATokenOnceForEachRank) {
  const std::vector<ShardMessage> shards = Start();
  ASSERT_NE(shards[0].counts, nullptr);
  EXPECT_EQ(shards[0].counts, shards[1].counts);
  EXPECT_THAT(shards[0].counts->rows, ElementsAre(1, 1, 1, 2));
  EXPECT_THAT(shards[0].counts->rows_per_expert, ElementsAre(1, 2, 2, 2));
}

TEST_F(BatchStoreTest, MatrixComputedHereIsTimedHere) {
  Start();
  const KeptBatch& batch = *store_.Find(5, 9);
  EXPECT_EQ(batch.counts, CountExchange::kCoordinator);
  EXPECT_GT(batch.times.counts_ns, 0);
}

TEST_F(BatchStoreTest, ShardsOfRanksThatExchangeTheCountsSaySoAndCarryNoMatrix) {
  start_.counts = CountExchange::kDevice;
  for (const ShardMessage& shard : Start()) {
    EXPECT_EQ(shard.counts, nullptr);
    EXPECT_TRUE(shard.device_counts);
    EXPECT_FALSE(shard.topk_ids.empty());
  }
  const KeptBatch& batch = *store_.Find(5, 9);
  EXPECT_EQ(batch.counts, CountExchange::kDevice);
  EXPECT_EQ(batch.times.counts_ns, 0);
}

TEST_F(BatchStoreTest, ProbeThatTheRanksCountSaysSo) {
  StartProbe probe{.epoch = 5, .batch = 1, .layer = 3, .num_tokens = 4};
  probe.shards = {{0, 11, {0, 2}}, {1, 12, {2, 4}}};
  EXPECT_NE(store_.Start(probe, 1000)[0].counts, nullptr);
  probe.batch = 2;
  probe.counts = CountExchange::kDevice;
  const std::vector<ShardMessage> shards = store_.Start(probe, 1000);
  EXPECT_EQ(shards[0].counts, nullptr);
  EXPECT_TRUE(shards[0].device_counts);
}

TEST_F(BatchStoreTest, UnroutedShardsCarryNoIdsAndNoMatrix) {
  start_.routed = false;
  start_.counts = CountExchange::kStreams;
  first_.topk_ids.clear();
  first_.topk_weights.clear();
  second_.topk_ids.clear();
  second_.topk_weights.clear();
  const std::vector<ShardMessage> shards = Start();
  EXPECT_EQ(shards[0].counts, nullptr);
  EXPECT_FALSE(shards[0].device_counts);
  EXPECT_TRUE(shards[0].topk_ids.empty());
  EXPECT_THAT(Unpack<float>(shards[1].hidden), ElementsAre(20, 21, 30, 31));
}

TEST_F(BatchStoreTest, OutputIsPutTogetherByRequest) {
  Start();
  int rank = -1;
  ASSERT_TRUE(Take(12, {7, 8, 9, 10}, &rank).ok());
  EXPECT_EQ(rank, 1);
  ASSERT_TRUE(Take(11, {1, 2, 3, 4}, &rank).ok());
  EXPECT_EQ(rank, 0);
  const KeptBatch& batch = *store_.Find(5, 9);
  EXPECT_EQ(batch.times.ffn_ns, 12);
  std::vector<float> rows(6);
  const std::span<char> out(reinterpret_cast<char*>(rows.data()), rows.size() * sizeof(float));
  ASSERT_TRUE(CopyOutput(batch, {0, 3}, out).ok());
  EXPECT_THAT(rows, ElementsAre(1, 2, 3, 4, 7, 8));
  ASSERT_TRUE(CopyOutput(batch, {3, 4}, out.first(8)).ok());
  EXPECT_THAT(rows, ElementsAre(9, 10, 3, 4, 7, 8));
}

TEST_F(BatchStoreTest, OutputOfTheWrongSizeIsInternalAndNotTaken) {
  Start();
  int rank = 0;
  const absl::Status status = Take(11, {1, 2, 3}, &rank);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("12 bytes"));
  EXPECT_EQ(rank, -1);
  std::vector<char> out(8);
  EXPECT_EQ(CopyOutput(*store_.Find(5, 9), {0, 1}, out).code(), absl::StatusCode::kInternal)
      << "its rows are missing";
}

TEST_F(BatchStoreArenaTest, RowsOfAWorkerThatHasItMappedGoThroughIt) {
  store_.UseArena(5, 12);
  const std::vector<ShardMessage> shards = Start();
  EXPECT_FALSE(shards[0].in_arena);
  EXPECT_THAT(Unpack<float>(shards[0].hidden), ElementsAre(0, 1, 10, 11));
  ASSERT_TRUE(shards[1].in_arena);
  EXPECT_EQ(shards[1].first_row, 2);
  EXPECT_EQ(arena_->rows(shards[1].row_block), Rows());
  EXPECT_EQ(shards[1].num_tokens, 2);
  EXPECT_TRUE(shards[1].hidden.empty());
  EXPECT_TRUE(shards[1].topk_ids.empty());
  EXPECT_TRUE(shards[1].topk_weights.empty());
  auto* rows = reinterpret_cast<float*>(Rows()) + 2 * kHidden;
  EXPECT_THAT(std::vector<float>(rows, rows + 4), ElementsAre(20, 21, 30, 31));
  const std::int32_t* ids = arena_->topk_ids(1) + 2 * kTopk;
  EXPECT_THAT(std::vector<std::int32_t>(ids, ids + 4), ElementsAre(3, 3, 1, 2));
  const float* weights = arena_->topk_weights(1) + 2 * kTopk;
  EXPECT_THAT(std::vector<float>(weights, weights + 4), ElementsAre(5, 6, 7, 8));

  // Its output comes the same way, the other's in its message.
  int rank = -1;
  EXPECT_EQ(Take(12, {7, 8, 9, 10}, &rank).code(), absl::StatusCode::kInternal);
  std::copy_n(std::begin({7.0f, 8.0f, 9.0f, 10.0f}), 4, rows);
  ASSERT_TRUE(Take(12, {}, &rank).ok());
  EXPECT_EQ(rank, 1);
  ASSERT_TRUE(Take(11, {1, 2, 3, 4}, &rank).ok());
  std::vector<float> output(8);
  ASSERT_TRUE(
      CopyOutput(*store_.Find(5, 9), {0, 4}, {reinterpret_cast<char*>(output.data()), 32}).ok());
  EXPECT_THAT(output, ElementsAre(1, 2, 3, 4, 7, 8, 9, 10));
}

TEST_F(BatchStoreArenaTest, RanksThatSeeAllRowsAreToldWhoseTheyAre) {
  for (const StreamId stream : {11, 12}) {
    store_.UseArena(5, stream);
    store_.UseSharedRows(5, stream);
  }
  for (const ShardMessage& shard : Start()) {
    EXPECT_TRUE(shard.in_arena);
    EXPECT_THAT(shard.shard_begin, ElementsAre(0, 2, 4));
  }
  // However the rows are cut.
  start_.shards = {{0, 11, {0, 1}}, {1, 12, {1, 4}}};
  const std::vector<ShardMessage> shards = Start();
  EXPECT_THAT(shards[1].shard_begin, ElementsAre(0, 1, 4));
  EXPECT_EQ(shards[1].first_row, 1);
  ASSERT_NE(shards[0].counts, nullptr);
  EXPECT_THAT(shards[0].counts->rows, ElementsAre(1, 0, 1, 3));
}

TEST_F(BatchStoreArenaTest, NoRankIsToldWhereOneDoesNotSeeAllRows) {
  const auto expect_none = [this] {
    for (const ShardMessage& shard : Start()) EXPECT_THAT(shard.shard_begin, ElementsAre());
  };
  store_.UseArena(5, 11);
  store_.UseSharedRows(5, 11);
  store_.UseSharedRows(5, 12);  // Without the arena it is of no effect.
  expect_none();
  store_.UseArena(5, 12);
  expect_none();
  store_.UseSharedRows(4, 12);  // Of another epoch.
  expect_none();
  store_.UseSharedRows(5, 12);
  EXPECT_THAT(Start()[0].shard_begin, ElementsAre(0, 2, 4));
  start_.routed = false;
  start_.counts = CountExchange::kStreams;
  expect_none();
}

TEST_F(BatchStoreArenaTest, ArenaOfAnotherEpochIsNotUsed) {
  store_.UseArena(4, 11);
  EXPECT_FALSE(Start()[0].in_arena);
  store_.UseArena(5, 11);
  start_.epoch = 6;
  EXPECT_FALSE(Start()[0].in_arena);
  store_.CloseArena(5);
  start_.epoch = 5;
  EXPECT_FALSE(Start()[0].in_arena);
}

// The first request's rows lie in a region and its output goes to one; the second's are inline.
class BatchStoreRegionTest : public BatchStoreArenaTest {
 protected:
  BatchStoreRegionTest() : object_(256), registry_(ShmOptions{.allowed = true}) {
    EXPECT_TRUE(registry_.Register("in", object_.key(), 8, 100).ok());
    EXPECT_TRUE(registry_.Register("out", object_.key(), 108, 148).ok());
    object_.Write(8 + 4, first_hidden_bytes_);
    first_.hidden = {};
    first_.source = {registry_.Find("in").value(), 4};
    first_.output = {registry_.Find("out").value(), 16};
    first_.output_bytes = 24;
  }

  void ReachBy(std::vector<StreamId> streams) {
    for (const StreamId stream : streams) {
      store_.UseArena(5, stream);
      store_.UseRegions(5, stream);
    }
  }
  // Both ranks have ended, rank 0 with `faults`.
  void EndBoth(const std::vector<RegionFault>& faults = {}) {
    for (const StreamId stream : {11, 12}) {
      BatchDone done;
      done.stream = stream;
      done.epoch = 5;
      done.batch = 9;
      int rank = -1;
      const bool in_arena = store_.Find(5, 9)->in_arena[stream - 11];
      const auto& mine = stream == 11 ? faults : std::vector<RegionFault>{};
      ASSERT_TRUE(
          store_.TakeOutput(done, in_arena ? "" : Pack({1, 2, 3, 4}), {}, 2000, &rank, mine).ok());
    }
  }
  absl::Status Deliver(std::size_t part, std::span<char> out = {}) {
    const KeptBatch& batch = *store_.Find(5, 9);
    return DeliverOutput(batch, batch.parts[part], out);
  }
  bool ReleasedAfterUnregister() {
    first_.source = {};
    first_.output = {};
    released_ = std::make_shared<bool>(false);
    EXPECT_TRUE(registry_
                    .Unregister(ShmKind::kSystem, "",
                                [released = released_](const auto&) { *released = true; })
                    .ok());
    return *released_;
  }

  ShmObject object_;
  ShmRegistry registry_;
  std::shared_ptr<bool> released_;
};

TEST_F(BatchStoreRegionTest, WorkersThatReachRegionsAreToldWhereRowsLieAndGo) {
  ReachBy({11, 12});
  const std::vector<ShardMessage> shards = Start();
  ASSERT_EQ(shards[0].sources.size(), 1u);
  EXPECT_EQ(shards[0].sources[0].region, first_.source.region->info().id);
  EXPECT_EQ(shards[0].sources[0].label, "'in'");
  EXPECT_EQ(shards[0].sources[0].object_offset, 12u);
  EXPECT_EQ(shards[0].sources[0].first_row, 0);
  EXPECT_EQ(shards[0].sources[0].num_rows, 2);
  ASSERT_EQ(shards[1].sources.size(), 1u);
  EXPECT_EQ(shards[1].sources[0].object_offset, 12u + 2 * 8);
  EXPECT_EQ(shards[1].sources[0].num_rows, 1) << "the other row is the second request's";
  ASSERT_EQ(shards[1].targets.size(), 1u);
  EXPECT_EQ(shards[1].targets[0].region, first_.output.region->info().id);
  EXPECT_EQ(shards[1].targets[0].object_offset, 108u + 16 + 2 * 8);
  const auto* rows = reinterpret_cast<const float*>(Rows());
  EXPECT_THAT(std::vector<float>(rows + 6, rows + 8), ElementsAre(30, 31));
  EXPECT_EQ(store_.Find(5, 9)->direct_bytes, 48);
  EXPECT_EQ(store_.Find(5, 9)->copied_bytes, 0);
  const std::string before = object_.Read(0, 256);
  EndBoth();
  EXPECT_TRUE(Deliver(0).ok());
  EXPECT_EQ(object_.Read(0, 256), before) << "the workers have written it";
}

TEST_F(BatchStoreRegionTest, RowsThatWorkersAreStillToReadAreSharedAsThoseThatFollow) {
  for (const StreamId stream : {11, 12}) {
    store_.UseArena(5, stream);
    store_.UseSharedRows(5, stream);
  }
  // Read by the coordinator they are in the arena when the shards go out.
  EXPECT_THAT(Start()[0].shard_begin, ElementsAre(0, 2, 4));
  EXPECT_FALSE(Start()[0].rows_follow);
  store_.UseRegions(5, 11);
  const std::vector<ShardMessage> shards = Start();
  EXPECT_TRUE(shards[1].sources.empty());
  for (const ShardMessage& shard : shards) {
    EXPECT_THAT(shard.shard_begin, ElementsAre(0, 2, 4));
    EXPECT_TRUE(shard.rows_follow);
  }
}

TEST_F(BatchStoreRegionTest, ForOtherWorkersRowsAreCopiedBothWays) {
  ReachBy({12});
  const std::vector<ShardMessage> shards = Start();
  EXPECT_TRUE(shards[0].sources.empty());
  EXPECT_TRUE(shards[0].targets.empty());
  EXPECT_THAT(Unpack<float>(shards[0].hidden), ElementsAre(0, 1, 10, 11));
  EXPECT_EQ(shards[1].sources.size(), 1u);
  EXPECT_EQ(store_.Find(5, 9)->direct_bytes, 16);
  EXPECT_EQ(store_.Find(5, 9)->copied_bytes, 32);
  EndBoth();
  ASSERT_TRUE(Deliver(0).ok());
  EXPECT_THAT(Unpack<float>(object_.Read(124, 24)), ElementsAre(1, 2, 3, 4, 0, 0));
}

TEST_F(BatchStoreRegionTest, TruncatedRegionFailsItsRequestAlone) {
  object_.Truncate(20);
  const std::vector<ShardMessage> shards = Start();
  EXPECT_THAT(Unpack<float>(shards[0].hidden), ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(Unpack<float>(shards[1].hidden), ElementsAre(0, 0, 30, 31));
  EndBoth();
  const absl::Status failed = Deliver(0);
  EXPECT_EQ(failed.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(failed.message()), HasSubstr("truncated"));
  std::string out(8, '\0');
  EXPECT_TRUE(Deliver(1, out).ok());
  EXPECT_THAT(Unpack<float>(out), ElementsAre(3, 4));
}

TEST_F(BatchStoreRegionTest, FaultOfAWorkerIsThatOfTheRequestWhoseRowItNames) {
  ReachBy({11, 12});
  Start();
  EndBoth({{1, absl::ResourceExhaustedError("no room")}, {77, absl::InternalError("no such row")}});
  EXPECT_EQ(Deliver(0).code(), absl::StatusCode::kResourceExhausted);
  std::string out(8, '\0');
  EXPECT_TRUE(Deliver(1, out).ok());
}

TEST_F(BatchStoreRegionTest, RegionsAreKeptUntilTheBatchHasEnded) {
  ReachBy({11, 12});
  Start();
  const std::uint64_t in = first_.source.region->info().id;
  EXPECT_TRUE(store_.regions().TakeForgotten().empty());
  EXPECT_FALSE(ReleasedAfterUnregister());
  EXPECT_TRUE(registry_.DuplicateDescriptor(in).ok()) << "a worker may still ask for it";
  EndBoth();
  store_.Erase(5, 9);
  EXPECT_TRUE(*released_);
  EXPECT_EQ(registry_.DuplicateDescriptor(in).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(store_.regions().TakeForgotten().size(), 2u);
  EXPECT_TRUE(store_.regions().TakeForgotten().empty());
}

TEST_F(BatchStoreRegionTest, RegionsOfADroppedBatchAreKeptUntilItsWorkersHaveLeft) {
  ReachBy({11, 12});
  Start();
  BatchDone failed;
  failed.stream = 11;
  failed.epoch = 5;
  failed.batch = 9;
  failed.code = absl::StatusCode::kInternal;
  store_.TakeFailure(failed);
  store_.Drop(5, 9, [](StreamId) { return true; });
  EXPECT_FALSE(ReleasedAfterUnregister());
  store_.regions().Leave(11);
  EXPECT_FALSE(*released_) << "that one had ended the batch";
  store_.regions().Leave(12);
  EXPECT_TRUE(*released_);
}

TEST_F(BatchStoreRegionTest, RegionsOfADroppedBatchDoNotWaitForWorkersWithoutRows) {
  start_.shards = {{0, 11, {0, 4}}, {1, 12, {4, 4}}};
  ReachBy({11, 12});
  std::vector<ShardMessage> shards = Start();
  store_.HoldBack(5, 9, start_.shards[1], std::move(shards[1]));
  store_.Drop(5, 9, [](StreamId) { return true; });
  EXPECT_FALSE(ReleasedAfterUnregister());
  store_.regions().Leave(11);
  EXPECT_TRUE(*released_);
}

TEST_F(BatchStoreRegionTest, RegionsOfADroppedBatchAreFreeWhereItsWorkersAreGone) {
  ReachBy({11, 12});
  Start();
  store_.Drop(5, 9, [](StreamId) { return false; });
  EXPECT_TRUE(ReleasedAfterUnregister());
}

// All tensors of the first request lie in CUDA memory, and its output goes there.
class BatchStoreDeviceTest : public BatchStoreRegionTest {
 protected:
  BatchStoreDeviceTest() {
    const auto region = registry_.ReserveCuda("gpu", std::string(64, 'h'), 0, 4096).value();
    EXPECT_TRUE(registry_.Confirm(*region).ok());
    first_.source = {region, 16};
    first_.output = {region, 256};
    first_.ids_source = {region, 512};
    first_.weights_source = {region, 1024};
    first_.wide_ids = true;
    first_.topk_ids.clear();
    first_.topk_weights.clear();
    start_.counts = CountExchange::kStreams;
  }
  bool CudaReleasedAfterUnregister() {
    first_ = {};
    released_ = std::make_shared<bool>(false);
    EXPECT_TRUE(registry_
                    .Unregister(ShmKind::kCuda, "",
                                [released = released_](const auto&) { *released = true; })
                    .ok());
    return *released_;
  }
};

TEST_F(BatchStoreDeviceTest, EveryWorkerIsToldThePlacesOfItsRowsAndNothingIsReadHere) {
  const std::vector<ShardMessage> shards = Start();
  ASSERT_EQ(shards[0].device_rows.size(), 1u);
  const DeviceRows& all = shards[0].device_rows[0];
  EXPECT_EQ(all.first_row, 0);
  EXPECT_EQ(all.num_rows, 2);
  EXPECT_EQ(all.request_row, 0);
  EXPECT_EQ(all.hidden->offset_bytes, 16u);
  EXPECT_EQ(all.output->offset_bytes, 256u);
  EXPECT_TRUE(shards[0].hidden.empty()) << "all of its rows are there";
  EXPECT_TRUE(shards[0].sources.empty());
  ASSERT_EQ(shards[1].device_rows.size(), 1u);
  const DeviceRows& last = shards[1].device_rows[0];
  EXPECT_EQ(last.first_row, 0);
  EXPECT_EQ(last.num_rows, 1) << "the other row is the second request's";
  EXPECT_EQ(last.request_row, 2);
  EXPECT_EQ(last.hidden->offset_bytes, 16u + 2 * 8);
  EXPECT_EQ(last.output->offset_bytes, 256u + 2 * 8);
  EXPECT_EQ(last.topk_ids->offset_bytes, 512u + 2 * kTopk * 8);
  EXPECT_EQ(last.topk_weights->offset_bytes, 1024u + 2 * kTopk * 4);
  EXPECT_TRUE(last.wide_ids);
  EXPECT_THAT(Unpack<float>(shards[1].hidden), ElementsAre(0, 0, 30, 31));
  EXPECT_THAT(Unpack<std::int32_t>(shards[1].topk_ids), ElementsAre(0, 0, 1, 2));
  EXPECT_THAT(Unpack<float>(shards[1].topk_weights), ElementsAre(0, 0, 7, 8));
  EXPECT_EQ(store_.Find(5, 9)->device_bytes, 48);
  EXPECT_EQ(store_.Find(5, 9)->copied_bytes, 0);
  EXPECT_TRUE(store_.regions().TakeForgotten().empty());
}

TEST_F(BatchStoreDeviceTest, ShardWhoseOutputIsOnTheDeviceAnswersWithoutRows) {
  Start();
  int rank = -1;
  EXPECT_EQ(Take(11, {1, 2, 3, 4}, &rank).code(), absl::StatusCode::kInternal);
  ASSERT_TRUE(Take(11, {}, &rank).ok());
  EXPECT_EQ(rank, 0);
  ASSERT_TRUE(Take(12, {5, 6, 7, 8}, &rank).ok());
  EXPECT_TRUE(Deliver(0).ok());
  std::string out(8, '\0');
  ASSERT_TRUE(Deliver(1, out).ok());
  EXPECT_THAT(Unpack<float>(out), ElementsAre(7, 8));
}

TEST_F(BatchStoreDeviceTest, RegionIsKeptUntilTheWorkersOfADroppedBatchHaveLeft) {
  Start();
  store_.Drop(5, 9, [](StreamId) { return true; });
  EXPECT_FALSE(CudaReleasedAfterUnregister());
  store_.regions().Leave(11);
  EXPECT_FALSE(*released_);
  store_.regions().Leave(12);
  EXPECT_TRUE(*released_);
}

TEST_F(BatchStoreTest, ShardsHeldBackAreGivenOnce) {
  start_.shards = {{0, 11, {0, 4}}, {1, 12, {4, 4}}};
  std::vector<ShardMessage> shards = Start();
  store_.HoldBack(5, 8, start_.shards[1], shards[1]);
  EXPECT_TRUE(store_.TakeHeldBack(5, 8).empty()) << "there is no such batch";
  store_.HoldBack(5, 9, start_.shards[1], std::move(shards[1]));
  const std::vector<HeldShard> held = store_.TakeHeldBack(5, 9);
  ASSERT_EQ(held.size(), 1u);
  EXPECT_EQ(held[0].plan.stream, 12u);
  EXPECT_EQ(held[0].message.batch, 9u);
  EXPECT_TRUE(store_.TakeHeldBack(5, 9).empty());
}

TEST_F(BatchStoreTest, UnknownBatchStreamOrRepeatIsNotTaken) {
  Start();
  int rank = 0;
  EXPECT_TRUE(Take(11, {1}, &rank, 10).ok());
  EXPECT_EQ(rank, -1);
  EXPECT_TRUE(Take(99, {1}, &rank).ok());
  EXPECT_EQ(rank, -1);
  ASSERT_TRUE(Take(11, {1, 2, 3, 4}, &rank).ok());
  EXPECT_EQ(rank, 0);
  EXPECT_TRUE(Take(11, {5, 6, 7, 8}, &rank).ok());
  EXPECT_EQ(rank, -1);
  store_.Erase(5, 9);
  EXPECT_EQ(store_.Find(5, 9), nullptr);
}

}  // namespace
}  // namespace epserve::coordinator
