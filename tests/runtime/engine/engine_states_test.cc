// The engine's life: loading and keeping weights, epochs, aborts, and calls out of turn.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/engine/engine_cluster.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::Batch;
using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::EngineCluster;
using ::epserve::testing::TempDirectory;
using ::testing::HasSubstr;
using Code = absl::StatusCode;

Batch SmallBatch(std::uint64_t sequence) {
  Batch batch;
  batch.sequence = sequence;
  batch.num_tokens = 4;
  batch.topk = 2;
  batch.hidden.resize(4 * 32 * sizeof(float));
  batch.ids = {0, 7, 1, 6, 2, 5, 3, 4};
  batch.weights.assign(8, 0.5f);
  return batch;
}

// A batch from Dispatch to its end: a device backend says only in Finish what went wrong before.
absl::Status RunStaged(Engine& engine, int slot, const CountMatrix& counts) {
  std::vector<float> output(4 * 32);
  if (auto status = engine.Dispatch(slot, counts); !status.ok()) return status;
  if (auto status = engine.RunExperts(slot); !status.ok()) return status;
  if (auto status = engine.Combine(slot); !status.ok()) return status;
  return engine.Finish(slot, output.data(), nullptr, nullptr);
}

class EngineStatesTest : public testing::EngineBackendTest {
 protected:
  void SetUp() override {
    testing::EngineBackendTest::SetUp();
    testing::WriteCheckpoint(path(), {});
  }
  std::filesystem::path path() const { return directory_.path() / "model"; }

  EngineOptions Options() const {
    EngineOptions options;
    options.checkpoint_dir = path().string();
    options.cluster_id = "engine-states-" + std::to_string(::getpid());
    options.max_batch_tokens = 64;
    return options;
  }

  TempDirectory directory_;
};

TEST_F(EngineStatesTest, BadOptionsOrCheckpointAreRefusedAtCreation) {
  EngineOptions options = Options();
  options.checkpoint_dir = "/nonexistent/model";
  EXPECT_EQ(testing::CreateTestEngine(options, 0).status().code(), Code::kNotFound);
  options = Options();
  options.cluster_id = "a/b";
  EXPECT_EQ(testing::CreateTestEngine(options, 0).status().code(), Code::kInvalidArgument);
  options = Options();
  options.max_batch_tokens = 0;
  EXPECT_EQ(testing::CreateTestEngine(options, 0).status().code(), Code::kInvalidArgument);
  options = Options();
  options.num_slots = 0;
  EXPECT_EQ(testing::CreateTestEngine(options, 0).status().code(), Code::kInvalidArgument);
  options = Options();
  options.num_slots = 17;
  EXPECT_EQ(testing::CreateTestEngine(options, 0).status().code(), Code::kInvalidArgument);
  if (testing::kCudaBackend) return;  // It has no threads that compute.
  options = Options();
  options.compute_threads = 0;
  EXPECT_EQ(testing::CreateTestEngine(options, 0).status().code(), Code::kInvalidArgument);
}

TEST_F(EngineStatesTest, MemoryPlanCountsWeightsAsTheyAreHeld) {
  const auto engine = testing::CreateTestEngine(Options(), 0);
  ASSERT_TRUE(engine.ok()) << engine.status();
  const Placement placement = EvenPlacement(8, 3);
  const auto plan = (*engine)->PlanMemory(placement, 0);
  ASSERT_TRUE(plan.ok()) << plan.status();
  if (testing::kCudaBackend) {
    EXPECT_EQ(plan->held_type, "bf16, rows as bf16");
    EXPECT_EQ(plan->weight_bytes, 2u * 3u * 3u * 32u * 48u * 2u);
  } else {
    EXPECT_EQ(plan->held_type, "fp32");
    EXPECT_EQ(plan->weight_bytes, 2u * (3u * 3u * 32u * 48u + 8u * 32u) * 4u);
  }
  EXPECT_GT(plan->heap_bytes, 0u);
  EXPECT_GT(plan->workspace_bytes, 0u);
  EXPECT_EQ((*engine)->PlanMemory(placement, 3).status().code(), Code::kInvalidArgument);
  EXPECT_EQ((*engine)->PlanMemory(EvenPlacement(9, 3), 0).status().code(), Code::kInvalidArgument);
}

TEST_F(EngineStatesTest, SameRangeIsKeptAndAnotherIsReadAgain) {
  const auto engine = testing::CreateTestEngine(Options(), 0);
  ASSERT_TRUE(engine.ok());
  int calls = 0;
  const auto progress = [&](std::uint64_t, std::uint64_t) { ++calls; };
  ASSERT_TRUE((*engine)->LoadExperts(EvenPlacement(8, 2), 1, progress).ok());
  EXPECT_GT(calls, 2);
  // With the file's bytes gone, only what is held can be had.
  std::filesystem::resize_file(path() / "model.safetensors", 8);
  calls = 0;
  EXPECT_TRUE((*engine)->LoadExperts(EvenPlacement(8, 2), 1, progress).ok());
  EXPECT_EQ(calls, 1);
  const absl::Status other = (*engine)->LoadExperts(EvenPlacement(8, 2), 0, progress);
  EXPECT_EQ(other.code(), Code::kDataLoss) << other;
  // After a failed load nothing is loaded.
  EXPECT_EQ((*engine)->CreateHeap(1).status().code(), Code::kFailedPrecondition);
}

TEST_F(EngineStatesTest, OutputTakenAfterCombineNeedsNoPlaceInFinish) {
  if (testing::kCudaBackend) GTEST_SKIP() << "a device's output is not where the host can read it";
  EngineCluster cluster(path().string(), 1);
  cluster.StartEpoch(5);
  Engine& engine = cluster.engine(0);
  const Batch batch = SmallBatch(1);
  ShardInput input;
  input.sequence = 1;
  input.layer = batch.layer;
  input.num_tokens = 4;
  input.topk = 2;
  input.hidden = batch.hidden.data();
  input.topk_ids = batch.ids.data();
  input.topk_weights = batch.weights.data();
  const auto staged = engine.Stage(input);
  ASSERT_TRUE(staged.ok()) << staged.status();
  const CountMatrix counts = {
      .num_ranks = 1, .rows = staged->rows_to_rank, .rows_per_expert = staged->rows_per_expert};
  ASSERT_TRUE(engine.Dispatch(0, counts).ok());
  ASSERT_TRUE(engine.RunExperts(0).ok());
  EXPECT_EQ(engine.CombinedRows(0), nullptr);
  ASSERT_TRUE(engine.Combine(0).ok());
  EXPECT_NE(engine.CombinedRows(0), nullptr);
  EXPECT_TRUE(engine.Finish(0, nullptr, nullptr, nullptr).ok());
  EXPECT_EQ(engine.CombinedRows(0), nullptr);
}

TEST_F(EngineStatesTest, HandleTypeIsOfTheOpenEpoch) {
  const auto fresh = testing::CreateTestEngine(Options(), 0);
  ASSERT_TRUE(fresh.ok());
  EXPECT_EQ((*fresh)->handle_type(), "");
  EngineCluster cluster(path().string(), 1);
  cluster.StartEpoch(5);
  EXPECT_EQ(cluster.engine(0).handle_type(), testing::kCudaBackend ? "fd" : "shm");
  cluster.engine(0).CloseEpoch();
  EXPECT_EQ(cluster.engine(0).handle_type(), "");
}

TEST_F(EngineStatesTest, CallsOutOfTurnAreFailedPrecondition) {
  const auto fresh = testing::CreateTestEngine(Options(), 0);
  ASSERT_TRUE(fresh.ok());
  EXPECT_EQ((*fresh)->CreateHeap(1).status().code(), Code::kFailedPrecondition);
  EXPECT_EQ((*fresh)->OpenPeers({}).code(), Code::kFailedPrecondition);
  ShardInput input;
  input.topk = 1;
  EXPECT_EQ((*fresh)->Stage(input).status().code(), Code::kFailedPrecondition);
  (*fresh)->Discard(0);

  EngineCluster cluster(path().string(), 1);
  cluster.StartEpoch(5);
  Engine& engine = cluster.engine(0);
  EXPECT_EQ(engine.CreateHeap(6).status().code(), Code::kFailedPrecondition);
  EXPECT_EQ(engine.LoadExperts(cluster.placement(), 0, nullptr).code(), Code::kFailedPrecondition);
  EXPECT_EQ(engine.Dispatch(0, CountMatrix()).code(), Code::kFailedPrecondition);
  EXPECT_EQ(engine.RunExperts(0).code(), Code::kFailedPrecondition);
  EXPECT_EQ(engine.Combine(1).code(), Code::kFailedPrecondition);
  EXPECT_EQ(engine.Finish(0, nullptr, nullptr, nullptr).code(), Code::kFailedPrecondition);
  EXPECT_EQ(engine.Combine(2).code(), Code::kInvalidArgument);
  ASSERT_TRUE(engine.Stage(input).ok());
  EXPECT_EQ(engine.Stage(input).status().code(), Code::kFailedPrecondition);
  engine.Discard(0);
  EXPECT_TRUE(engine.Stage(input).ok());
}

TEST_F(EngineStatesTest, BadShardIsRefusedNamingTheValue) {
  EngineCluster cluster(path().string(), 2);
  cluster.StartEpoch(1);
  const std::vector<float> hidden(2 * 32);
  const std::vector<std::int32_t> ids = {0, 1, 2, 8};
  const std::vector<float> weights(4);
  ShardInput good;
  good.num_tokens = 2;
  good.topk = 2;
  good.hidden = hidden.data();
  good.topk_ids = ids.data();
  good.topk_weights = weights.data();
  const auto expect = [&](const ShardInput& input, Code code, const std::string& part) {
    const auto staged = cluster.engine(0).Stage(input);
    EXPECT_EQ(staged.status().code(), code) << staged.status();
    EXPECT_THAT(std::string(staged.status().message()), HasSubstr(part));
  };
  expect(good, Code::kInvalidArgument, "topk_ids[1][1] 8");
  ShardInput input = good;
  input.layer = 2;
  expect(input, Code::kNotFound, "layer 2");
  input = good;
  input.num_tokens = 33;
  expect(input, Code::kInvalidArgument, "num_tokens 33");
  input = good;
  input.topk = 17;
  expect(input, Code::kInvalidArgument, "topk 17");
  input = good;
  input.dtype = DataType::kInt32;
  expect(input, Code::kInvalidArgument, "int32");
  input = good;
  input.topk_weights = nullptr;
  expect(input, Code::kInvalidArgument, "together");
  input = good;
  input.topk_ids = nullptr;
  input.topk_weights = nullptr;
  input.topk = 1;
  expect(input, Code::kInvalidArgument, "topk 1 is not the router's 2");
}

TEST_F(EngineStatesTest, ShardWithoutIdsNeedsARouter) {
  const CheckpointSpec spec{.router = false};
  testing::WriteCheckpoint(directory_.path() / "plain", spec);
  EngineCluster cluster((directory_.path() / "plain").string(), 1);
  const std::vector<float> hidden(32);
  ShardInput input;
  input.num_tokens = 1;
  input.topk = 2;
  input.hidden = hidden.data();
  const auto staged = cluster.engine(0).Stage(input);
  EXPECT_EQ(staged.status().code(), Code::kInvalidArgument);
  EXPECT_THAT(std::string(staged.status().message()), HasSubstr("no router"));
}

TEST_F(EngineStatesTest, CountsThatContradictTheShardAreRefused) {
  EngineCluster cluster(path().string(), 1);
  cluster.StartEpoch(1);
  const Batch batch = SmallBatch(1);
  ShardInput input;
  input.sequence = 1;
  input.num_tokens = 4;
  input.topk = 2;
  input.hidden = batch.hidden.data();
  input.topk_ids = batch.ids.data();
  input.topk_weights = batch.weights.data();
  ASSERT_TRUE(cluster.engine(0).Stage(input).ok());
  CountMatrix counts = ComputeCountMatrix(batch.ids, 4, 2, cluster.placement());
  --counts.rows[0];
  EXPECT_EQ(cluster.engine(0).Dispatch(0, counts).code(), Code::kInvalidArgument);
  // The slot has failed: it goes nowhere but to Discard.
  EXPECT_EQ(cluster.engine(0).RunExperts(0).code(), Code::kFailedPrecondition);
  cluster.engine(0).Discard(0);
  EXPECT_TRUE(cluster.Run(SmallBatch(2)).ok());
}

TEST_F(EngineStatesTest, AbortEndsAWaitAndHoldsUntilTheNextHeap) {
  EngineCluster cluster(path().string(), 2);
  const Batch batch = SmallBatch(1);
  ShardInput input;
  input.num_tokens = 2;
  input.topk = 2;
  input.hidden = batch.hidden.data();
  input.topk_ids = batch.ids.data();
  input.topk_weights = batch.weights.data();
  Engine& engine = cluster.engine(0);
  const CountMatrix counts = ComputeCountMatrix(batch.ids, 4, 2, cluster.placement());
  // The abort comes before the wait in some rounds and into it in others; either must end it.
  for (std::uint64_t round = 1; round <= 6; ++round) {
    cluster.StartEpoch(round);
    input.sequence = 1;
    ASSERT_TRUE(engine.Stage(input).ok());
    // Rank 1 never dispatches.
    auto waiting = std::async(std::launch::async, [&] { return RunStaged(engine, 0, counts); });
    std::this_thread::sleep_for(std::chrono::milliseconds(4 * (round - 1)));
    engine.Abort();
    ASSERT_EQ(waiting.wait_for(std::chrono::seconds(20)), std::future_status::ready);
    EXPECT_EQ(waiting.get().code(), Code::kAborted);
    engine.Discard(0);
    input.sequence = 2;
    ASSERT_TRUE(engine.Stage(input).ok());
    EXPECT_EQ(engine.Dispatch(0, counts).code(), Code::kAborted);
    engine.CloseEpoch();
    EXPECT_EQ(engine.OpenPeers({}).code(), Code::kAborted);
  }
  // The next epoch runs, with sequences from the start.
  cluster.StartEpoch(7);
  EXPECT_TRUE(cluster.Run(SmallBatch(1)).ok());
}

TEST_F(EngineStatesTest, PeerThatNeverComesIsDeadlineExceededNamingIt) {
  EngineCluster cluster(path().string(), 2, 64, 1, absl::Milliseconds(50));
  cluster.StartEpoch(1);
  const Batch batch = SmallBatch(1);
  ShardInput input;
  input.sequence = 1;
  input.num_tokens = 2;
  input.topk = 2;
  input.hidden = batch.hidden.data();
  input.topk_ids = batch.ids.data();
  input.topk_weights = batch.weights.data();
  ASSERT_TRUE(cluster.engine(0).Stage(input).ok());
  const CountMatrix counts = ComputeCountMatrix(batch.ids, 4, 2, cluster.placement());
  const absl::Status status = RunStaged(cluster.engine(0), 0, counts);
  EXPECT_EQ(status.code(), Code::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
}

TEST_F(EngineStatesTest, EpochsFollowOneAnotherWithTheSameWeights) {
  EngineCluster cluster(path().string(), 3);
  std::vector<std::byte> first;
  for (std::uint64_t epoch = 10; epoch < 14; ++epoch) {
    cluster.StartEpoch(epoch);
    Batch batch = SmallBatch(1);
    auto* hidden = reinterpret_cast<float*>(batch.hidden.data());
    for (int i = 0; i < 4 * 32; ++i) hidden[i] = static_cast<float>(i % 7) - 3.0f;
    const auto result = cluster.Run(batch);
    ASSERT_TRUE(result.ok());
    if (first.empty()) first = result.output;
    EXPECT_EQ(result.output, first);
  }
}

}  // namespace
}  // namespace epserve::runtime
