// What the cuda engine alone has: rows in memory of every kind, rows sent as fp8, peers that do not
// fit. All else it shares with the host's engine: engine_test.cc and engine_states_test.cc.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "runtime/base/cuda_memory.h"
#include "tests/runtime/engine/engine_cluster.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::EngineCluster;
using ::epserve::testing::TempDirectory;
using ::testing::HasSubstr;

constexpr std::int64_t kHidden = 128;
constexpr std::int64_t kTokens = 24;
constexpr int kTopk = 2;

class CudaEngineTest : public testing::EngineBackendTest {
 protected:
  void SetUp() override {
    testing::EngineBackendTest::SetUp();
    CheckpointSpec spec{.dtype = DataType::kBf16, .hidden = kHidden};
    testing::WriteCheckpoint(path(), spec);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) rows_.push_back(normal(random));
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i) {
      ids_.push_back(static_cast<std::int32_t>(random() % 8));
      weights_.push_back(normal(random));
    }
  }
  std::string path() const { return (directory_.path() / "model").string(); }

  EngineOptions Options(int rank) const {
    EngineOptions options;
    options.checkpoint_dir = path();
    options.cluster_id = "cuda-engine-test-" + std::to_string(::getpid());
    options.max_batch_tokens = 64;
    options.cuda.device = rank % NumCudaDevices();
    options.cuda.comm_blocks = 8;
    return options;
  }

  ShardInput Input(const void* hidden, std::uint64_t sequence) const {
    ShardInput input;
    input.sequence = sequence;
    input.num_tokens = kTokens;
    input.topk = kTopk;
    input.hidden = hidden;
    input.topk_ids = ids_.data();
    input.topk_weights = weights_.data();
    return input;
  }

  // One batch of a rank that is alone.
  absl::Status Run(Engine& engine, const Placement& placement, const void* hidden, void* output) {
    const CountMatrix counts = ComputeCountMatrix(ids_, kTokens, kTopk, placement);
    if (auto staged = engine.Stage(Input(hidden, ++sequence_)); !staged.ok()) {
      return staged.status();
    }
    if (auto status = engine.Dispatch(0, counts); !status.ok()) return status;
    if (auto status = engine.RunExperts(0); !status.ok()) return status;
    if (auto status = engine.Combine(0); !status.ok()) return status;
    return engine.Finish(0, output, nullptr, nullptr);
  }

  TempDirectory directory_;
  std::vector<float> rows_;  // [T, H]
  std::vector<std::int32_t> ids_;
  std::vector<float> weights_;
  std::uint64_t sequence_ = 0;
};

TEST_F(CudaEngineTest, RowsInMemoryOfEveryKindGiveTheSameBits) {
  EngineCluster cluster(path(), 1);
  cluster.StartEpoch(1);
  Engine& engine = cluster.engine(0);
  const std::size_t bytes = rows_.size() * sizeof(float);
  std::vector<float> want(rows_.size(), NAN);
  ASSERT_TRUE(Run(engine, cluster.placement(), rows_.data(), want.data()).ok());
  EXPECT_FALSE(std::isnan(want[5]));

  auto device_rows = DeviceBuffer::Create(bytes);
  auto device_output = DeviceBuffer::Create(bytes);
  ASSERT_TRUE(device_rows.ok() && device_output.ok());
  ASSERT_EQ(cudaMemcpy(device_rows->as<void>(), rows_.data(), bytes, cudaMemcpyHostToDevice),
            cudaSuccess);
  ASSERT_TRUE(
      Run(engine, cluster.placement(), device_rows->as<void>(), device_output->as<void>()).ok());
  std::vector<float> got(rows_.size(), NAN);
  ASSERT_EQ(cudaMemcpy(got.data(), device_output->as<void>(), bytes, cudaMemcpyDeviceToHost),
            cudaSuccess);
  EXPECT_EQ(got, want);

  // As workers use the coordinator's rows: the output takes the input's place.
  std::vector<float> shared = rows_;
  ASSERT_TRUE(engine.UseHostRows({reinterpret_cast<std::byte*>(shared.data()), bytes}).ok());
  cudaPointerAttributes attributes;
  ASSERT_EQ(cudaPointerGetAttributes(&attributes, shared.data()), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeHost);
  ASSERT_TRUE(Run(engine, cluster.placement(), shared.data(), shared.data()).ok());
  EXPECT_EQ(shared, want);
  engine.CloseEpoch();
  ASSERT_EQ(cudaPointerGetAttributes(&attributes, shared.data()), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered) << "still pinned after its epoch";
}

// Routing in device memory: in pieces, with ids of either width, wherever they lie.
class CudaEngineRoutingTest : public CudaEngineTest {
 protected:
  void SetUp() override {
    CudaEngineTest::SetUp();
    if (IsSkipped()) return;
    auto memory = DeviceBuffer::Create(kPlaceBytes * 8);
    ASSERT_TRUE(memory.ok()) << memory.status();
    memory_ = *std::move(memory);
  }

  // A copy of `values` in device memory, at an odd multiple of two bytes.
  template <typename T>
  const std::byte* Put(const std::vector<T>& values) {
    std::byte* const place = memory_.as<std::byte>() + kPlaceBytes * num_places_++ + 2;
    EXPECT_EQ(cudaMemcpy(place, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
    return place;
  }
  // The rows [begin, end) of the batch.
  template <typename Id>
  ShardDeviceRows Piece(std::int64_t begin, std::int64_t end) {
    const auto part = [&](const auto& values) {
      return std::vector(values.begin() + begin * kTopk, values.begin() + end * kTopk);
    };
    const auto ids = part(ids_);
    return {.first_row = begin,
            .num_rows = end - begin,
            .topk_ids = Put(std::vector<Id>(ids.begin(), ids.end())),
            .topk_weights = Put(part(weights_)),
            .wide_ids = sizeof(Id) == 8};
  }
  absl::Status RunUncounted(Engine& engine, std::span<const ShardDeviceRows> pieces, float* output,
                            std::vector<std::int64_t>* expert_rows) {
    ShardInput input = Input(rows_.data(), ++sequence_);
    input.topk_ids = nullptr;
    input.topk_weights = nullptr;
    input.device_rows = pieces;
    if (auto staged = engine.Stage(input); !staged.ok()) return staged.status();
    if (auto status = engine.DispatchUncounted(0); !status.ok()) return status;
    if (auto status = engine.RunExperts(0); !status.ok()) return status;
    if (auto status = engine.Combine(0); !status.ok()) return status;
    return engine.Finish(0, output, nullptr, expert_rows);
  }

  static constexpr std::size_t kPlaceBytes = 4096;
  DeviceBuffer memory_;
  std::size_t num_places_ = 0;
};

TEST_F(CudaEngineRoutingTest, RoutingOnTheDeviceGivesTheBitsOfRoutingOnTheHost) {
  EngineCluster cluster(path(), 1);
  cluster.StartEpoch(1);
  Engine& engine = cluster.engine(0);
  std::vector<float> want(rows_.size(), NAN);
  ids_[5] = -1;
  ASSERT_TRUE(Run(engine, cluster.placement(), rows_.data(), want.data()).ok());
  const std::vector<ShardDeviceRows> pieces = {Piece<std::int32_t>(0, 7),
                                               Piece<std::int64_t>(7, kTokens)};
  std::vector<float> got(rows_.size(), NAN);
  std::vector<std::int64_t> expert_rows;
  const absl::Status status = RunUncounted(engine, pieces, got.data(), &expert_rows);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(got, want);
  EXPECT_TRUE(engine.routing_faults(0).empty());
  std::vector<std::int64_t> named(8);
  for (const std::int32_t id : ids_) named[static_cast<std::size_t>(std::max(id, 0))] += id >= 0;
  EXPECT_EQ(expert_rows, named);
}

TEST_F(CudaEngineRoutingTest, FirstWrongEntryOfAPieceIsToldAndThePieceNamesNoExpert) {
  EngineCluster cluster(path(), 1);
  cluster.StartEpoch(1);
  Engine& engine = cluster.engine(0);
  std::vector<float> want(rows_.size(), NAN);
  ASSERT_TRUE(Run(engine, cluster.placement(), rows_.data(), want.data()).ok());
  ids_[2 * kTopk] = -2;
  ids_[4 * kTopk] = 8;
  weights_[0] = NAN;  // The ids come first.
  weights_[12 * kTopk + 1] = INFINITY;
  const std::vector<ShardDeviceRows> pieces = {
      Piece<std::int64_t>(0, 9), Piece<std::int32_t>(9, 16), Piece<std::int32_t>(16, kTokens)};
  std::vector<float> got(rows_.size(), NAN);
  const absl::Status status = RunUncounted(engine, pieces, got.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status;
  const auto faults = engine.routing_faults(0);
  ASSERT_EQ(faults.size(), 2u);
  EXPECT_EQ(faults[0].piece, 0u);
  EXPECT_FALSE(faults[0].in_weights);
  EXPECT_EQ(faults[0].entry, 2 * kTopk);
  EXPECT_EQ(faults[0].id, -2);
  EXPECT_EQ(faults[1].piece, 1u);
  EXPECT_TRUE(faults[1].in_weights);
  EXPECT_EQ(faults[1].entry, 3 * kTopk + 1);
  EXPECT_EQ(faults[1].weight, INFINITY);
  std::fill_n(want.begin(), 16 * kHidden, 0.0F);
  EXPECT_EQ(got, want);
}

TEST_F(CudaEngineRoutingTest, RoutingOnTheDeviceNeedsAllRowsAndAnUncountedDispatch) {
  EngineCluster cluster(path(), 1);
  cluster.StartEpoch(1);
  Engine& engine = cluster.engine(0);
  std::vector<ShardDeviceRows> pieces = {Piece<std::int32_t>(0, kTokens - 1)};
  EXPECT_EQ(RunUncounted(engine, pieces, nullptr, nullptr).code(),
            absl::StatusCode::kInvalidArgument);
  pieces = {Piece<std::int32_t>(0, kTokens)};
  ShardInput input = Input(rows_.data(), ++sequence_);
  input.topk_ids = nullptr;
  input.topk_weights = nullptr;
  input.device_rows = pieces;
  ASSERT_TRUE(engine.Stage(input).ok());
  EXPECT_EQ(engine.Dispatch(0, CountMatrix()).code(), absl::StatusCode::kFailedPrecondition);
  engine.Discard(0);
  pieces = std::vector<ShardDeviceRows>(kMaxRoutedPieces + 1, pieces[0]);
  input.device_rows = pieces;
  EXPECT_EQ(engine.Stage(input).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaEngineTest, RowsSentAsFp8AreRightWithinItsPrecision) {
  testing::Batch batch;
  batch.num_tokens = kTokens;
  batch.topk = kTopk;
  batch.hidden.resize(rows_.size() * sizeof(float));
  std::memcpy(batch.hidden.data(), rows_.data(), batch.hidden.size());
  batch.ids = ids_;
  batch.weights = weights_;
  std::vector<std::vector<float>> outputs;
  for (const bool fp8 : {false, true}) {
    EngineCluster cluster(path(), 2, 64, 1, absl::Seconds(60), fp8);
    cluster.StartEpoch(1);
    EXPECT_EQ(cluster.engine(0).PlanMemory(cluster.placement(), 0)->held_type,
              fp8 ? "bf16, rows as fp8" : "bf16, rows as bf16");
    const testing::BatchResult result = cluster.Run(batch);
    for (const absl::Status& status : result.statuses) ASSERT_TRUE(status.ok()) << status;
    outputs.emplace_back(rows_.size());
    std::memcpy(outputs.back().data(), result.output.data(), result.output.size());
  }
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    error += std::pow(outputs[1][i] - outputs[0][i], 2);
    norm += std::pow(outputs[0][i], 2);
  }
  EXPECT_GT(error, 0.0) << "no row was cast";
  EXPECT_LE(std::sqrt(error / norm), 6e-2);
}

TEST_F(CudaEngineTest, PeersOfAnotherEpochOrSettingAreRefused) {
  const Placement placement = EvenPlacement(8, 2);
  std::vector<std::unique_ptr<Engine>> engines;
  for (int rank = 0; rank < 2; ++rank) {
    EngineOptions options = Options(rank);
    options.cuda.fp8_dispatch = rank == 1;
    auto engine = CreateCudaEngine(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    ASSERT_TRUE((*engine)->LoadExperts(placement, rank, nullptr).ok());
    engines.push_back(*std::move(engine));
  }
  std::vector<std::string> handles = {*engines[0]->CreateHeap(5), *engines[1]->CreateHeap(5)};
  const absl::Status setting = engines[0]->OpenPeers(handles);
  EXPECT_EQ(setting.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(setting.message()), HasSubstr("same flags"));
  handles[1] = "not a handle";
  EXPECT_EQ(engines[0]->OpenPeers(handles).code(), absl::StatusCode::kInvalidArgument);
  engines[1]->CloseEpoch();
  handles[1] = *engines[1]->CreateHeap(6);
  EXPECT_THAT(std::string(engines[0]->OpenPeers(handles).message()), HasSubstr("epoch 6"));
}

TEST_F(CudaEngineTest, SealedOrVanishedPeerIsUnavailableAndOneWithoutTheSecretIsRefused) {
  const Placement placement = EvenPlacement(8, 2);
  std::vector<std::unique_ptr<Engine>> engines;
  for (int rank = 0; rank < 2; ++rank) {
    auto engine = CreateCudaEngine(Options(rank));
    ASSERT_TRUE(engine.ok()) << engine.status();
    ASSERT_TRUE((*engine)->LoadExperts(placement, rank, nullptr).ok());
    engines.push_back(*std::move(engine));
  }
  std::vector<std::string> handles = {*engines[0]->CreateHeap(5), *engines[1]->CreateHeap(5)};
  std::vector<std::string> forged = handles;
  // The secret follows the address, which takes 112 bytes from byte 48 on.
  forged[1][48 + 112] = static_cast<char>(forged[1][48 + 112] ^ 1);
  EXPECT_EQ(engines[0]->OpenPeers(forged).code(), absl::StatusCode::kPermissionDenied);
  engines[1]->SealHeap();
  EXPECT_EQ(engines[0]->OpenPeers(handles).code(), absl::StatusCode::kUnavailable);
}

TEST_F(CudaEngineTest, MissingDeviceIsRefusedNamingHowManyThereAre) {
  EngineOptions options = Options(0);
  options.cuda.device = NumCudaDevices();
  const absl::Status status = CreateCudaEngine(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("outside [0, " + std::to_string(NumCudaDevices()) + ")"));
}

TEST_F(CudaEngineTest, WhatDoesNotFitTheDeviceIsRefusedSayingNeededAndFree) {
  EngineOptions options = Options(0);
  options.max_batch_tokens = std::int64_t{1} << 24;
  options.num_slots = 16;
  const auto engine = CreateCudaEngine(options);
  ASSERT_TRUE(engine.ok()) << engine.status();
  const absl::Status status = (*engine)->LoadExperts(EvenPlacement(8, 1), 0, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("has free"));
}

}  // namespace
}  // namespace epserve::runtime
