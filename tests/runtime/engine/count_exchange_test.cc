// The three ways to a count matrix (computed from all ids, gathered from the ranks' counts,
// exchanged by the ranks) give the same matrix and the same bits of output.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/engine/engine_cluster.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::Batch;
using ::epserve::testing::BatchResult;
using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::CountsFrom;
using ::epserve::testing::EngineCluster;
using ::epserve::testing::TempDirectory;
using ::testing::HasSubstr;
using Code = absl::StatusCode;

Batch RandomBatch(const CheckpointSpec& spec, std::int64_t tokens, int topk, std::mt19937* random) {
  constexpr DataType kTypes[] = {DataType::kFp32, DataType::kFp16, DataType::kBf16};
  std::normal_distribution<float> normal;
  Batch batch;
  batch.dtype = kTypes[(*random)() % 3];
  batch.num_tokens = tokens;
  batch.topk = topk;
  std::vector<float> hidden(static_cast<std::size_t>(tokens * spec.hidden));
  for (float& value : hidden) value = normal(*random);
  batch.hidden.resize(hidden.size() * DataTypeBytes(batch.dtype));
  ConvertFromFloat(batch.dtype, hidden.data(), batch.hidden.data(), hidden.size());
  for (std::int64_t i = 0; i < tokens * topk; ++i) {
    batch.ids.push_back(
        (*random)() % 7 == 0 ? -1 : static_cast<std::int32_t>((*random)() % spec.experts));
    batch.weights.push_back(normal(*random));
  }
  return batch;
}

constexpr std::int64_t kMaxTokens = 64;  // of an EngineCluster's batch

class CountExchangeTest : public testing::EngineBackendTest {
 protected:
  void SetUp() override {
    EngineBackendTest::SetUp();
    testing::WriteCheckpoint(path(), spec_);
  }
  std::filesystem::path path() const { return directory_.path() / "model"; }

  // Runs the batch each way, of which `ways`; all must have one matrix and one output.
  void ExpectTheSame(EngineCluster* cluster, Batch batch, std::vector<CountsFrom> ways) {
    BatchResult first;
    for (const CountsFrom way : ways) {
      batch.sequence = ++sequence_;
      const BatchResult result = cluster->Run(batch, way);
      for (const absl::Status& status : result.statuses) ASSERT_TRUE(status.ok()) << status;
      ASSERT_EQ(result.matrices.size(), static_cast<std::size_t>(cluster->num_ranks()));
      for (const CountMatrix& matrix : result.matrices) {
        EXPECT_EQ(matrix.rows, result.matrices[0].rows);
        EXPECT_EQ(matrix.rows_per_expert, result.matrices[0].rows_per_expert);
      }
      EXPECT_EQ(result.rows_per_expert, result.matrices[0].rows_per_expert);
      if (way == ways.front()) {
        first = result;
        continue;
      }
      EXPECT_EQ(result.matrices[0].rows, first.matrices[0].rows);
      EXPECT_EQ(result.matrices[0].rows_per_expert, first.matrices[0].rows_per_expert);
      EXPECT_EQ(result.output, first.output);
    }
  }
  void ExpectTheSame(EngineCluster* cluster, const Batch& batch) {
    std::vector<CountsFrom> ways = {CountsFrom::kWholeBatch, CountsFrom::kGathering,
                                    CountsFrom::kRanks};
    if (cluster->engine(0).dispatches_uncounted(batch.topk)) ways.push_back(CountsFrom::kNobody);
    ExpectTheSame(cluster, batch, ways);
  }

  const CheckpointSpec spec_;
  TempDirectory directory_;
  std::uint64_t sequence_ = 0;
};

TEST_F(CountExchangeTest, AllWaysGiveOneMatrixAndOneOutputForEveryTopk) {
  std::mt19937 random(21);
  for (const int ranks : {1, 3, 4, 8}) {
    EngineCluster cluster(path().string(), ranks);
    cluster.StartEpoch(1);
    sequence_ = 0;
    for (int topk = 1; topk <= 16; ++topk) {
      SCOPED_TRACE(absl::StrCat("ranks ", ranks, " topk ", topk));
      // A GPU's buffers are for the model's topk: the more experts a token, the fewer tokens.
      const std::int64_t most =
          testing::kCudaBackend && topk > spec_.topk ? kMaxTokens * spec_.topk / topk : kMaxTokens;
      ExpectTheSame(&cluster, RandomBatch(spec_, 1 + random() % most, topk, &random));
    }
  }
}

TEST_F(CountExchangeTest, AllWaysAgreeOnSkewedEmptyAndTinyBatches) {
  std::mt19937 random(22);
  EngineCluster cluster(path().string(), 5);
  cluster.StartEpoch(1);
  for (std::int64_t tokens = 0; tokens <= 6; ++tokens) {  // Fewer than ranks, too.
    ExpectTheSame(&cluster, RandomBatch(spec_, tokens, 2, &random));
  }
  for (const std::int32_t id : {-1, 0, 7}) {
    Batch batch = RandomBatch(spec_, 64, 2, &random);
    for (std::int32_t& each : batch.ids) each = id;
    ExpectTheSame(&cluster, batch);
  }
  // All of one shard's tokens to nobody, the others' to one rank.
  Batch batch = RandomBatch(spec_, 60, 2, &random);
  for (std::size_t i = 0; i < batch.ids.size(); ++i) batch.ids[i] = i < 12 * 2 ? -1 : 1;
  ExpectTheSame(&cluster, batch);
}

TEST_F(CountExchangeTest, WhatTheRouterDecidesIsCountedAlikeByGatheringAndByTheRanks) {
  std::mt19937 random(23);
  EngineCluster cluster(path().string(), 4);
  cluster.StartEpoch(1);
  for (const std::int64_t tokens : {0, 3, 17, 64}) {
    Batch batch = RandomBatch(spec_, tokens, 2, &random);
    batch.ids.clear();
    batch.weights.clear();
    std::vector<CountsFrom> ways = {CountsFrom::kGathering, CountsFrom::kRanks};
    if (testing::kCudaBackend) ways.push_back(CountsFrom::kNobody);
    ExpectTheSame(&cluster, batch, ways);
  }
}

TEST_F(CountExchangeTest, BatchesInBothSlotsExchangeAtOnce) {
  EngineCluster cluster(path().string(), 4);
  cluster.StartEpoch(1);
  std::vector<std::thread> slots;
  for (int slot = 0; slot < 2; ++slot) {
    slots.emplace_back([&, slot] {
      std::mt19937 random(30 + static_cast<std::uint32_t>(slot));
      for (std::uint64_t i = 0; i < 20; ++i) {
        Batch batch = RandomBatch(spec_, random() % 65, 2, &random);
        batch.slot = slot;
        batch.sequence = 2 * i + static_cast<std::uint64_t>(slot) + 1;
        const BatchResult result = cluster.Run(batch, CountsFrom::kRanks);
        for (const absl::Status& status : result.statuses) ASSERT_TRUE(status.ok()) << status;
        const CountMatrix whole =
            ComputeCountMatrix(batch.ids, batch.num_tokens, batch.topk, cluster.placement());
        ASSERT_EQ(result.matrices.back().rows, whole.rows);
        ASSERT_EQ(result.matrices.back().rows_per_expert, whole.rows_per_expert);
      }
    });
  }
  for (std::thread& slot : slots) slot.join();
}

ShardInput ShardOfTwo(const Batch& batch) {
  ShardInput input;
  input.sequence = 1;
  input.dtype = batch.dtype;
  input.num_tokens = 2;
  input.topk = batch.topk;
  input.hidden = batch.hidden.data();
  input.topk_ids = batch.ids.data();
  input.topk_weights = batch.weights.data();
  return input;
}

TEST_F(CountExchangeTest, OnlyBatchesThatFitUncountedAreDispatchedSo) {
  std::mt19937 random(26);
  EngineCluster cluster(path().string(), 1);
  cluster.StartEpoch(1);
  EXPECT_EQ(cluster.engine(0).dispatches_uncounted(spec_.topk), testing::kCudaBackend);
  EXPECT_FALSE(cluster.engine(0).dispatches_uncounted(spec_.topk + 1));
  Batch batch = RandomBatch(spec_, 4, spec_.topk + 1, &random);
  batch.sequence = 1;
  const BatchResult result = cluster.Run(batch, CountsFrom::kNobody);
  EXPECT_EQ(result.statuses[0].code(),
            testing::kCudaBackend ? Code::kInvalidArgument : Code::kUnimplemented)
      << result.statuses[0];
}

TEST_F(CountExchangeTest, CallOutOfTurnIsFailedPrecondition) {
  EngineCluster cluster(path().string(), 1);
  EXPECT_EQ(cluster.engine(0).ExchangeCounts(0).status().code(), Code::kFailedPrecondition);
  cluster.StartEpoch(1);
  EXPECT_TRUE(cluster.engine(0).exchanges_counts());
  EXPECT_EQ(cluster.engine(0).ExchangeCounts(0).status().code(), Code::kFailedPrecondition);
  EXPECT_EQ(cluster.engine(0).ExchangeCounts(2).status().code(), Code::kInvalidArgument);
}

TEST_F(CountExchangeTest, PeerThatNeverCountsIsDeadlineExceededNamingIt) {
  std::mt19937 random(24);
  EngineCluster cluster(path().string(), 2, 64, 1, absl::Milliseconds(50));
  cluster.StartEpoch(1);
  const Batch batch = RandomBatch(spec_, 4, 2, &random);
  ASSERT_TRUE(cluster.engine(0).Stage(ShardOfTwo(batch)).ok());
  const auto counts = cluster.engine(0).ExchangeCounts(0);
  EXPECT_EQ(counts.status().code(), Code::kDeadlineExceeded) << counts.status();
  EXPECT_THAT(std::string(counts.status().message()), HasSubstr("counts: rank 0 waited "));
  EXPECT_THAT(std::string(counts.status().message()), HasSubstr("for rank 1"));
  // The slot has failed: it goes nowhere but to Discard.
  EXPECT_EQ(cluster.engine(0).Dispatch(0, CountMatrix()).code(), Code::kFailedPrecondition);
  cluster.engine(0).Discard(0);
}

TEST_F(CountExchangeTest, AbortEndsTheWaitForAPeersCounts) {
  std::mt19937 random(25);
  EngineCluster cluster(path().string(), 2);
  const Batch batch = RandomBatch(spec_, 4, 2, &random);
  // The abort comes before the wait in some rounds and into it in others; either must end it.
  for (std::uint64_t round = 1; round <= 6; ++round) {
    cluster.StartEpoch(round);
    ASSERT_TRUE(cluster.engine(0).Stage(ShardOfTwo(batch)).ok());
    auto waiting = std::async(std::launch::async,
                              [&] { return cluster.engine(0).ExchangeCounts(0).status(); });
    std::this_thread::sleep_for(std::chrono::milliseconds(4 * (round - 1)));
    cluster.engine(0).Abort();
    ASSERT_EQ(waiting.wait_for(std::chrono::seconds(20)), std::future_status::ready);
    EXPECT_EQ(waiting.get().code(), Code::kAborted);
    cluster.engine(0).Discard(0);
  }
}

}  // namespace
}  // namespace epserve::runtime
