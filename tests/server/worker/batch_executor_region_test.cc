// The executor with rows in clients' regions.
#include "server/worker/batch_executor.h"
#include "tests/server/worker/batch_executor_fixture.h"
#include "tests/server/worker/region_server_fixture.h"

namespace epserve::worker {
namespace {

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
  const auto* rows = reinterpret_cast<const char*>(arena_->rows(BlockOf(0)));
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

}  // namespace
}  // namespace epserve::worker
