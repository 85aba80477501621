// Batches of so few rows that they are all one rank's: whose, and who counts them.
#include <algorithm>

#include "tests/server/coordinator/state_machine/state_machine_fixture.h"

namespace epserve::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Config SingleSourceUpTo(std::int64_t tokens) {
  Config config = TestConfig();
  config.single_source_tokens = tokens;
  return config;
}

Config Counting(CountExchangeMode mode) {
  Config config = SingleSourceUpTo(8);
  config.count_exchange = mode;
  return config;
}

// The ranks' rows of the batch that such a request makes, whose number is 2.
std::vector<std::int64_t> RowsByRank(const std::string& backend, std::int64_t num_tokens,
                                     RequestArrived request, std::int64_t single_source_tokens) {
  TestCluster cluster(SingleSourceUpTo(single_source_tokens));
  cluster.ServeOn(backend);
  const auto batch = First<StartBatch>(cluster.Request(1, num_tokens, request));
  EXPECT_TRUE(batch);
  std::vector<std::int64_t> rows;
  std::int64_t end = 0;
  for (const ShardPlan& shard : batch->shards) {
    EXPECT_EQ(shard.rows.begin, end);
    end = shard.rows.end;
    rows.push_back(shard.rows.size());
  }
  EXPECT_EQ(end, num_tokens);
  EXPECT_EQ(batch->single_source,
            std::count(rows.begin(), rows.end(), 0) == 3 && backend == "host");
  return rows;
}

TEST(SingleSourceTest, FewRowsAreAllTheRanksThatOwnsMostOfTheirExperts) {
  EXPECT_THAT(RowsByRank("host", 1, {.rank_of_most_experts = 2}, 1), ElementsAre(0, 0, 1, 0));
  EXPECT_THAT(RowsByRank("host", 8, {.rank_of_most_experts = 0}, 8), ElementsAre(8, 0, 0, 0));
  EXPECT_THAT(RowsByRank("host", 7, {.rank_of_most_experts = 3}, 8), ElementsAre(0, 0, 0, 7));
}

TEST(SingleSourceTest, FewRowsWhoseExpertsAreNotKnownAreTheRanksByTurns) {
  EXPECT_THAT(RowsByRank("host", 1, {}, 1), ElementsAre(0, 0, 1, 0));
  EXPECT_THAT(RowsByRank("host", 3, {.rank_of_most_experts = 4}, 8), ElementsAre(0, 0, 3, 0));
  TestCluster cluster(SingleSourceUpTo(8));
  cluster.ServeOn("host");
  for (BatchId batch = 2; batch < 10; ++batch) {
    const auto start = First<StartBatch>(cluster.Request(batch));
    ASSERT_TRUE(start);
    EXPECT_EQ(start->shards[batch % 4].rows.size(), 8) << batch;
    cluster.Finish(batch);
  }
}

TEST(SingleSourceTest, RowsThatTheWorkersRouteAreFewer) {
  EXPECT_THAT(RowsByRank("host", 4, {.routed = false}, 8), ElementsAre(0, 0, 4, 0));
  EXPECT_THAT(RowsByRank("host", 5, {.routed = false}, 8), ElementsAre(2, 1, 1, 1));
  EXPECT_THAT(RowsByRank("host", 2, {.routed = false}, 1), ElementsAre(1, 1, 0, 0));
}

TEST(SingleSourceTest, MoreRowsAndThoseOfGpusAreDividedAmongTheRanks) {
  EXPECT_THAT(RowsByRank("host", 9, {.rank_of_most_experts = 2}, 8), ElementsAre(3, 2, 2, 2));
  EXPECT_THAT(RowsByRank("cuda", 1, {.rank_of_most_experts = 2}, 8), ElementsAre(1, 0, 0, 0));
  EXPECT_THAT(RowsByRank("cuda", 8, {.rank_of_most_experts = 2}, 8), ElementsAre(2, 2, 2, 2));
}

TEST(SingleSourceTest, MergedRequestsThatAreFewTogetherHaveTheFirstOnesSource) {
  Config config = SingleSourceUpTo(8);
  config.merge_queued = true;
  config.input_is_told = true;
  TestCluster cluster(config);
  cluster.ServeOn("host");
  cluster.Request(1, 3, {.rank_of_most_experts = 1});
  cluster.Request(2, 5, {.rank_of_most_experts = 3});
  const auto few = First<StartBatch>(cluster.Do(InputTaken{}));
  ASSERT_TRUE(few);
  EXPECT_EQ(few->shards[1].rows.size(), 8);
  cluster.Finish(few->batch);
  cluster.Request(3, 4, {.rank_of_most_experts = 1});
  cluster.Request(4, 5, {.rank_of_most_experts = 1});
  const auto many = First<StartBatch>(cluster.Do(InputTaken{}));
  ASSERT_TRUE(many);
  EXPECT_EQ(many->shards[1].rows.size(), 2);
  EXPECT_FALSE(many->single_source);
}

// Four workers on CPUs that offer to count, and a batch of few rows whose ids are not seen.
class SingleSourceCountsTest : public ::testing::TestWithParam<CountExchangeMode> {
 protected:
  SingleSourceCountsTest() : cluster_(Counting(GetParam())) {
    cluster_.device_counts = true;
    cluster_.ServeOn("host");
    start_ = First<StartBatch>(cluster_.Request(1, 4, {.routed = false}));
  }

  TestCluster cluster_;
  std::optional<StartBatch> start_;
};

INSTANTIATE_TEST_SUITE_P(OverStreams, SingleSourceCountsTest,
                         ::testing::Values(CountExchangeMode::kAuto,
                                           CountExchangeMode::kCoordinator));

TEST_P(SingleSourceCountsTest, MatrixGoesOutOnceTheSourceAloneHasCounted) {
  ASSERT_TRUE(start_);
  EXPECT_TRUE(start_->single_source);
  EXPECT_EQ(start_->counts, CountExchange::kStreams);
  ASSERT_EQ(start_->shards[2].rows.size(), 4);
  Counts counts = cluster_.CountsOf(2, start_->batch);
  counts.rows_to_rank = {4, 0, 3, 2};
  counts.rows_per_expert[0] = 8;
  const auto matrix = First<SendCountMatrix>(cluster_.Do(counts));
  ASSERT_TRUE(matrix);
  EXPECT_EQ(matrix->streams.size(), 4u);
  EXPECT_EQ(matrix->counts.NumSent(2), 9);
  EXPECT_EQ(matrix->counts.NumReceived(0), 4);
  EXPECT_EQ(matrix->counts.rows_per_expert[0], 8);
  EXPECT_TRUE(Has<FinishBatch>(cluster_.Finish(start_->batch)));
}

TEST_P(SingleSourceCountsTest, CountsOfTheOthersAreStale) {
  ASSERT_TRUE(start_);
  for (const int i : {0, 1, 3}) {
    EXPECT_TRUE(cluster_.Do(cluster_.CountsOf(i, start_->batch)).empty());
  }
  EXPECT_EQ(cluster_.snapshot().stale_messages, 3u);
}

TEST_P(SingleSourceCountsTest, SourceThatNeverCountsIsNamedAlone) {
  ASSERT_TRUE(start_);
  const auto ended = First<SendEpochEnded>(cluster_.Run(60'000'000));
  ASSERT_TRUE(ended);
  EXPECT_THAT(ended->reason, HasSubstr("waited for worker w2 (rank 2) to count"));
}

TEST(SingleSourceTest, DeviceLeavesASingleSourcesCountsToTheWorkersToo) {
  TestCluster cluster(Counting(CountExchangeMode::kDevice));
  cluster.device_counts = true;
  cluster.ServeOn("host");
  const auto start = First<StartBatch>(cluster.Request(1, 4, {.routed = false}));
  ASSERT_TRUE(start);
  EXPECT_TRUE(start->single_source);
  EXPECT_EQ(start->counts, CountExchange::kDevice);
}

}  // namespace
}  // namespace epserve::coordinator
