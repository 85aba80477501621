// The executor with tensors in clients' CUDA memory, which is the test's own.
#include <limits>

#include "server/worker/batch_executor.h"
#include "tests/server/worker/batch_executor_fixture.h"

namespace epserve::worker {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class BatchExecutorDeviceTest : public BatchExecutorTest {
 protected:
  static constexpr std::uint64_t kRowBytes = FakeEngine::kHidden * sizeof(float);
  static constexpr std::uint64_t kIds = 256;
  static constexpr std::uint64_t kWeights = 512;
  static constexpr std::uint64_t kOutput = 768;

  // The client's memory has two rows, four ids and weights, and room for the output.
  void SetUp() override {
    memory_.Share("handle", &bytes_);
    engine_.set_device_regions(&memory_);
    device_regions_ = std::make_shared<OpenDeviceRegions>(&engine_);
    ASSERT_TRUE(device_regions_->Open({1, "'gpu'", "handle", 0, bytes_.size()}).status.ok());
    bytes_.replace(0, 2 * kRowBytes, std::string(kRowBytes, 'a') + std::string(kRowBytes, 'b'));
    PutIds<std::int32_t>({0, 5, 0, 5});
    PutWeights({1, 2, 3, 4});
  }

  template <typename Id>
  void PutIds(const std::vector<Id>& ids) {
    std::memcpy(bytes_.data() + kIds, ids.data(), ids.size() * sizeof(Id));
  }
  void PutWeights(const std::vector<float>& weights) {
    std::memcpy(bytes_.data() + kWeights, weights.data(), weights.size() * 4);
  }
  std::string Output() const { return bytes_.substr(kOutput, 2 * kRowBytes); }

  // Everything of both rows on the device; they are rows 10 and 11 of their request.
  static DeviceRows AllRows() {
    DeviceRows rows;
    rows.num_rows = kTokens;
    rows.request_row = 10;
    rows.hidden = server::DevicePlace{1, 0};
    rows.topk_ids = server::DevicePlace{1, kIds};
    rows.topk_weights = server::DevicePlace{1, kWeights};
    rows.output = server::DevicePlace{1, kOutput};
    return rows;
  }
  // The worker is to count: the coordinator has not seen the ids.
  static Shard MakeDeviceShard(std::uint64_t batch, DeviceRows rows = AllRows()) {
    Shard shard = MakeShard(batch);
    if (rows.hidden && rows.num_rows == shard.num_tokens) shard.hidden.clear();
    if (rows.topk_ids) {
      shard.counts.reset();
      shard.topk_ids.assign(shard.topk_ids.size(), '\0');
    }
    shard.device_rows = {std::move(rows)};
    return shard;
  }
  // Runs the shard to its end; what it reports as its counts becomes the matrix.
  BatchDone Run(Shard shard) {
    const std::uint64_t batch = shard.batch;
    const bool counted = shard.counts.has_value();
    executor_->Submit(std::move(shard));
    if (!counted) {
      const auto counts = reporter_.Next<CountsReport>();
      counts_ = counts.counts;
      runtime::CountMatrix matrix{.num_ranks = 2, .rows = {0, 0, 0, 0}};
      std::copy(counts_.rows_to_rank.begin(), counts_.rows_to_rank.end(), matrix.rows.begin() + 2);
      matrix.rows_per_expert = counts_.rows_per_expert;
      executor_->SetCounts({.epoch = kEpoch, .batch = batch, .counts = matrix});
    }
    return reporter_.Next<BatchDone>();
  }

  std::string bytes_ = std::string(1024, '.');
  FakeDeviceRegions memory_;
  runtime::ShardCounts counts_;
};

TEST_F(BatchExecutorDeviceTest, RowsIdsAndWeightsComeFromTheDeviceAndTheOutputGoesThere) {
  Serve();
  const BatchDone done = Run(MakeDeviceShard(1));
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_THAT(done.region_faults, IsEmpty());
  EXPECT_EQ(done.output, "");
  EXPECT_EQ(Output(), std::string(kRowBytes, 'a') + std::string(kRowBytes, 'b'));
  EXPECT_THAT(counts_.rows_per_expert, ElementsAre(2, 0, 0, 0, 0, 2, 0, 0));
  EXPECT_THAT(engine_.staged_ids(), ElementsAre(0, 5, 0, 5));
  EXPECT_THAT(engine_.staged_weights(), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(engine_.violations(), IsEmpty());
}

TEST_F(BatchExecutorDeviceTest, RowsOnTheDeviceAndRowsInTheMessageMakeOneShard) {
  Serve();
  DeviceRows rows;
  rows.first_row = 1;
  rows.num_rows = 1;
  rows.hidden = server::DevicePlace{1, kRowBytes};
  rows.output = server::DevicePlace{1, kOutput};
  const BatchDone done = Run(MakeDeviceShard(1, rows));
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_EQ(done.output, std::string(kRowBytes, 'x') + std::string(kRowBytes, 'b'));
  EXPECT_EQ(Output(), std::string(kRowBytes, 'b') + std::string(kRowBytes, '.'));
  EXPECT_EQ(engine_.Count("read 0"), 0) << "its ids and weights came with it";
}

TEST_F(BatchExecutorDeviceTest, WideIdsAreNarrowed) {
  Serve();
  PutIds<std::int64_t>({7, -1, 6, 5});
  DeviceRows rows = AllRows();
  rows.wide_ids = true;
  ASSERT_TRUE(Run(MakeDeviceShard(1, rows)).status.ok());
  EXPECT_THAT(engine_.staged_ids(), ElementsAre(7, -1, 6, 5));
}

TEST_F(BatchExecutorDeviceTest, BadIdIsAFaultOfItsRequestWhoseRowsThenNameNoExpert) {
  Serve();
  for (const std::int64_t bad : {std::int64_t{FakeEngine::kExperts}, std::int64_t{-2},
                                 std::int64_t{1} << 32, std::numeric_limits<std::int64_t>::min()}) {
    PutIds<std::int64_t>({0, 5, 0, bad});
    DeviceRows rows = AllRows();
    rows.wide_ids = true;
    const BatchDone done = Run(MakeDeviceShard(1, rows));
    ASSERT_TRUE(done.status.ok()) << "the others in the batch are none the worse: " << done.status;
    ASSERT_EQ(done.region_faults.size(), 1u);
    EXPECT_EQ(done.region_faults[0].first_row, 0);
    EXPECT_EQ(done.region_faults[0].status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(done.region_faults[0].status.message(),
              absl::StrCat("infer: topk_ids[11,1] is ", bad, ", outside [-1, 8)"));
    EXPECT_THAT(engine_.staged_ids(), ElementsAre(-1, -1, -1, -1));
    EXPECT_THAT(counts_.rows_to_rank, ElementsAre(0, 0));
  }
}

TEST_F(BatchExecutorDeviceTest, BadIdOfOneRequestLeavesAnothersRowsAsTheyAre) {
  Serve();
  PutIds<std::int32_t>({99, 5, 3, 6});
  DeviceRows first = AllRows();
  first.num_rows = 1;
  DeviceRows second = first;
  second.first_row = 1;
  second.request_row = 0;
  second.hidden->offset_bytes += kRowBytes;
  second.topk_ids->offset_bytes += 8;
  second.topk_weights->offset_bytes += 8;
  second.output->offset_bytes += kRowBytes;
  Shard shard = MakeDeviceShard(1);
  shard.device_rows = {first, second};
  const BatchDone done = Run(std::move(shard));
  ASSERT_TRUE(done.status.ok()) << done.status;
  ASSERT_EQ(done.region_faults.size(), 1u);
  EXPECT_EQ(done.region_faults[0].first_row, 0);
  EXPECT_THAT(engine_.staged_ids(), ElementsAre(-1, -1, 3, 6));
  EXPECT_THAT(engine_.staged_weights(), ElementsAre(0, 0, 3, 4));
}

TEST_F(BatchExecutorDeviceTest, BadWeightBesideIdsThatAreCountedAlreadyWeighsNothing) {
  Serve();
  PutWeights({1, 2, std::numeric_limits<float>::quiet_NaN(), 4});
  DeviceRows rows = AllRows();
  rows.topk_ids.reset();
  const BatchDone done = Run(MakeDeviceShard(1, rows));
  ASSERT_TRUE(done.status.ok()) << done.status;
  ASSERT_EQ(done.region_faults.size(), 1u);
  EXPECT_THAT(std::string(done.region_faults[0].status.message()),
              HasSubstr("topk_weights[11,0] is nan, not a finite number"));
  EXPECT_THAT(engine_.staged_ids(), ElementsAre(0, 5, 0, 5)) << "as in the matrix";
  EXPECT_THAT(engine_.staged_weights(), ElementsAre(0, 0, 0, 0));
}

// Batches that an engine dispatches uncounted.
class BatchExecutorUncountedTest : public BatchExecutorDeviceTest {
 protected:
  void SetUp() override {
    BatchExecutorDeviceTest::SetUp();
    engine_.set_dispatches_uncounted(true);
  }
  static Shard MakeUncounted(std::uint64_t batch, DeviceRows rows = AllRows()) {
    Shard shard = MakeDeviceShard(batch, std::move(rows));
    shard.counts.reset();
    shard.device_counts = true;
    return shard;
  }
  BatchDone RunUncounted(Shard shard) {
    executor_->Submit(std::move(shard));
    return reporter_.Next<BatchDone>();
  }
};

TEST_F(BatchExecutorUncountedTest, RoutingStaysOnTheDeviceAndNobodyWaitsForCounts) {
  Serve();
  DeviceRows rows = AllRows();
  rows.wide_ids = true;
  const BatchDone done = RunUncounted(MakeUncounted(1, rows));
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_EQ(engine_.Count("read 0"), 0);
  EXPECT_EQ(engine_.Count("counts 0"), 0);
  EXPECT_EQ(engine_.Count("dispatch 0"), 0);
  EXPECT_EQ(engine_.Count("uncounted 0"), 1);
  EXPECT_EQ(done.times.counts_ns, 0);
  EXPECT_EQ(Output(), std::string(kRowBytes, 'a') + std::string(kRowBytes, 'b'));
  const auto staged = engine_.staged_device_rows();
  ASSERT_EQ(staged.size(), 1u);
  EXPECT_EQ(static_cast<const void*>(staged[0].topk_ids), bytes_.data() + kIds);
  EXPECT_EQ(static_cast<const void*>(staged[0].topk_weights), bytes_.data() + kWeights);
  EXPECT_TRUE(staged[0].wide_ids);
  EXPECT_THAT(engine_.violations(), IsEmpty());
}

TEST_F(BatchExecutorUncountedTest, WhatTheEngineFindsWrongIsAFaultOfItsRequest) {
  Serve();
  engine_.set_routing_faults({{.piece = 0, .entry = 3, .id = -7},
                              {.piece = 0, .entry = 2, .in_weights = true, .weight = INFINITY}});
  const BatchDone done = RunUncounted(MakeUncounted(1));
  ASSERT_TRUE(done.status.ok()) << done.status;
  ASSERT_EQ(done.region_faults.size(), 2u);
  EXPECT_EQ(done.region_faults[0].first_row, 0);
  EXPECT_EQ(done.region_faults[0].status,
            absl::InvalidArgumentError("infer: topk_ids[11,1] is -7, outside [-1, 8)"));
  EXPECT_EQ(done.region_faults[1].status,
            absl::InvalidArgumentError("infer: topk_weights[11,0] is inf, not a finite number"));
}

TEST_F(BatchExecutorUncountedTest, RoutingThatIsNotAllOnTheDeviceComesToTheHost) {
  Serve();
  DeviceRows ids_alone = AllRows();
  ids_alone.topk_weights.reset();
  DeviceRows one_row = AllRows();
  one_row.num_rows = 1;
  std::uint64_t batch = 0;
  for (const DeviceRows& rows : {ids_alone, one_row}) {
    Shard shard = MakeUncounted(++batch, rows);
    const BatchDone done = RunUncounted(std::move(shard));
    ASSERT_TRUE(done.status.ok()) << done.status;
    EXPECT_EQ(engine_.Count("read 0"), static_cast<int>(batch));
    EXPECT_EQ(engine_.Count("uncounted 0"), static_cast<int>(batch));
    EXPECT_EQ(engine_.staged_device_rows()[0].topk_ids, nullptr);
  }
}

TEST_F(BatchExecutorUncountedTest, MoreExpertsATokenThanTheEngineTakesAreCounted) {
  Serve();
  Shard shard = MakeUncounted(1);
  shard.topk = FakeEngine::kTopk + 1;
  shard.device_rows[0].topk_weights->offset_bytes -= 128;  // Room for six.
  shard.topk_ids.assign(6 * 4, '\0');
  shard.topk_weights.assign(6 * 4, '\0');
  PutIds<std::int32_t>({0, 5, 1, 0, 5, 2});
  const BatchDone done = RunUncounted(std::move(shard));
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_EQ(engine_.Count("read 0"), 1);
  EXPECT_EQ(engine_.Count("counts 0"), 1);
  EXPECT_EQ(engine_.Count("dispatch 0"), 1);
  EXPECT_THAT(engine_.staged_ids(), ElementsAre(0, 5, 1, 0, 5, 2));
}

TEST_F(BatchExecutorUncountedTest, ShardWhoseIdsTheCoordinatorHasSeenIsDispatchedByItsMatrix) {
  Serve();
  DeviceRows rows = AllRows();
  rows.topk_ids.reset();
  const BatchDone done = RunUncounted(MakeDeviceShard(1, rows));
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_EQ(engine_.Count("read 0"), 1);
  EXPECT_EQ(engine_.Count("dispatch 0"), 1);
}

TEST_F(BatchExecutorDeviceTest, RowsThatTheWorkerIsToRouteAreBroughtToTheHost) {
  Serve();
  DeviceRows rows;
  rows.num_rows = kTokens;
  rows.hidden = server::DevicePlace{1, 0};
  Shard shard = MakeDeviceShard(1, rows);
  shard.routed = false;
  shard.topk_ids.clear();
  shard.topk_weights.clear();
  shard.counts.reset();
  const BatchDone done = Run(std::move(shard));
  ASSERT_TRUE(done.status.ok()) << done.status;
  EXPECT_EQ(done.output, std::string(kRowBytes, 'a') + std::string(kRowBytes, 'b'));
  EXPECT_EQ(engine_.Count("read 0"), 1);
}

TEST_F(BatchExecutorDeviceTest, RowsOutsideTheShardOrTheRegionAreRefused) {
  Serve();
  std::uint64_t batch = 0;
  for (const auto& [first, count] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 3}, {-1, 1}, {1, 2}, {0, -1}, {std::numeric_limits<std::int64_t>::max(), 1}}) {
    Shard shard = MakeDeviceShard(++batch);
    shard.device_rows[0].first_row = first;
    shard.device_rows[0].num_rows = count;
    ExpectRefused(shard, StatusCode::kInvalidArgument, "device rows");
  }
  Shard twice = MakeDeviceShard(++batch);
  twice.device_rows.push_back(twice.device_rows[0]);
  ExpectRefused(twice, StatusCode::kInvalidArgument, "behind row 2");
  Shard past = MakeDeviceShard(++batch);
  past.device_rows[0].output->offset_bytes = bytes_.size() - 2 * kRowBytes + 1;
  ExpectRefused(past, StatusCode::kInvalidArgument, "pass the end of region 'gpu'");
  Shard unknown = MakeDeviceShard(++batch);
  unknown.device_rows[0].topk_ids->region = 9;
  ExpectRefused(unknown, StatusCode::kInternal, "region 9 is not open");
  EXPECT_EQ(engine_.Count("stage 0"), 0);
}

TEST_F(BatchExecutorDeviceTest, RegionStaysMappedWhileABatchUsesItAndNoLonger) {
  Serve();
  engine_.Hold("finish 0");
  DeviceRows rows = AllRows();
  rows.topk_ids.reset();
  executor_->Submit(MakeDeviceShard(1, rows));
  ASSERT_TRUE(engine_.AwaitStep("finish 0"));
  device_regions_->Close(std::vector<std::uint64_t>{1});
  EXPECT_EQ(memory_.num_open(), 1);
  engine_.Release("finish 0");
  ASSERT_TRUE(reporter_.Next<BatchDone>().status.ok());
  EXPECT_EQ(memory_.num_open(), 0) << "before the end was reported";
}

}  // namespace
}  // namespace epserve::worker
