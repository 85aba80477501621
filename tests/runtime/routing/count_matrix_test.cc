#include "runtime/routing/count_matrix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace epserve::runtime {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(EvenPlacementTest, FirstRanksOwnOneMoreWhereExpertsDoNotDivide) {
  EXPECT_THAT(EvenPlacement(10, 4).first_expert, ElementsAre(0, 3, 6, 8, 10));
  EXPECT_THAT(EvenPlacement(8, 4).first_expert, ElementsAre(0, 2, 4, 6, 8));
}

TEST(EvenPlacementTest, RanksBeyondTheExpertsOwnNone) {
  const Placement placement = EvenPlacement(2, 4);
  EXPECT_THAT(placement.first_expert, ElementsAre(0, 1, 2, 2, 2));
  EXPECT_EQ(placement.num_local_experts(3), 0);
}

TEST(PlacementTest, OwnerIsTheRankWhoseRangeHoldsTheExpert) {
  std::vector<Placement> placements = {{{0, 0, 5, 5, 6}}, {{0, 7, 7, 7}}, {{0, 0, 0, 9}}};
  for (const int experts : {1, 2, 7, 64, 257}) {
    for (const int ranks : {1, 2, 3, 4, 7, 64}) placements.push_back(EvenPlacement(experts, ranks));
  }
  for (const Placement& placement : placements) {
    for (std::int64_t expert = 0; expert < placement.num_experts(); ++expert) {
      const int owner = placement.OwnerOf(expert);
      ASSERT_GE(expert, placement.first_expert[owner]);
      ASSERT_LT(expert, placement.first_expert[owner + 1]);
    }
  }
}

TEST(ShardOfTest, ShardsAreContiguousAndDifferByOneAtMost) {
  for (std::int64_t tokens = 0; tokens < 40; ++tokens) {
    for (int ranks = 1; ranks < 9; ++ranks) {
      std::int64_t next = 0;
      std::int64_t longest = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const RowRange shard = ShardOf(tokens, ranks, rank);
        ASSERT_EQ(shard.begin, next);
        ASSERT_GE(shard.size(), tokens / ranks);
        next = shard.end;
        longest = std::max(longest, shard.size());
      }
      ASSERT_EQ(next, tokens);
      ASSERT_EQ(longest, MaxShardTokens(tokens, ranks));
    }
  }
}

TEST(CountMatrixTest, OffsetsAreTheSumsOfEarlierRanks) {
  CountMatrix counts;
  counts.num_ranks = 3;
  counts.rows = {1, 2, 3, 10, 20, 30, 100, 200, 300};
  EXPECT_EQ(counts.ReceiveOffset(0, 1), 0);
  EXPECT_EQ(counts.ReceiveOffset(2, 1), 22);
  EXPECT_EQ(counts.NumReceived(2), 333);
  EXPECT_EQ(counts.SendOffset(1, 2), 30);
  EXPECT_EQ(counts.NumSent(0), 6);
}

TEST(CountShardTest, DuplicateIdCountsTwiceForItsExpertAndOnceForItsRank) {
  const std::vector<std::int32_t> ids = {3, 3, -1, 2};
  std::vector<std::int32_t> rows(2, 0);
  std::vector<std::int64_t> experts(4, 0);
  CountShard(ids, 4, EvenPlacement(4, 2), rows, experts);
  EXPECT_THAT(rows, ElementsAre(0, 1));
  EXPECT_THAT(experts, ElementsAre(0, 0, 1, 2));
}

TEST(ComputeCountMatrixTest, RandomBatchesAgreeWithPlainCounting) {
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    const int ranks = 1 + static_cast<int>(random() % 6);
    const int experts = 1 + static_cast<int>(random() % 20);
    const int topk = 1 + static_cast<int>(random() % 16);
    const std::int64_t tokens = static_cast<std::int64_t>(random() % 30);
    std::vector<std::int32_t> ids(tokens * topk);
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % (experts + 1)) - 1;
    const Placement placement = EvenPlacement(experts, ranks);
    const CountMatrix counts = ComputeCountMatrix(ids, tokens, topk, placement);

    std::map<std::pair<int, int>, int> rows;
    std::vector<std::int64_t> per_expert(experts, 0);
    for (int src = 0; src < ranks; ++src) {
      for (std::int64_t t = ShardOf(tokens, ranks, src).begin; t < ShardOf(tokens, ranks, src).end;
           ++t) {
        std::set<int> destinations;
        for (int k = 0; k < topk; ++k) {
          const std::int32_t id = ids[t * topk + k];
          if (id < 0) continue;
          ++per_expert[id];
          for (int dst = 0; dst < ranks; ++dst) {
            if (id >= placement.first_expert[dst] && id < placement.first_expert[dst + 1]) {
              destinations.insert(dst);
            }
          }
        }
        for (const int dst : destinations) ++rows[{src, dst}];
      }
    }
    ASSERT_EQ(counts.rows_per_expert, per_expert);
    for (int src = 0; src < ranks; ++src) {
      for (int dst = 0; dst < ranks; ++dst) {
        ASSERT_EQ(counts.at(src, dst), (rows[{src, dst}])) << src << " to " << dst;
      }
    }
    ASSERT_TRUE(ValidateCountMatrix(counts, placement, std::max<std::int64_t>(tokens, 1)).ok());
  }
}

TEST(ComputeCountMatrixTest, ShardsMayBeCutAnywhere) {
  const std::vector<std::int32_t> ids = {0, 3, 1, -1, 2, 2};
  const std::vector<RowRange> shards = {{0, 0}, {0, 1}, {1, 3}};
  const CountMatrix counts = ComputeCountMatrix(ids, shards, 2, EvenPlacement(6, 3));
  EXPECT_THAT(counts.rows, ElementsAre(0, 0, 0, 1, 1, 0, 1, 1, 0));
  EXPECT_THAT(counts.rows_per_expert, ElementsAre(1, 1, 2, 1, 0, 0));
}

TEST(RankOfMostExpertsTest, TheLowestOfSeveralAndZeroForNone) {
  const Placement placement = EvenPlacement(6, 3);
  EXPECT_EQ(RankOfMostExperts(std::vector<std::int32_t>{0, 4, 5}, placement), 2);
  EXPECT_EQ(RankOfMostExperts(std::vector<std::int32_t>{4, 3, -1}, placement), 1);
  EXPECT_EQ(RankOfMostExperts(std::vector<std::int32_t>{-1, -1, -1}, placement), 0);
}

class ValidateCountMatrixTest : public testing::Test {
 protected:
  void ExpectRefused(const std::string& part) {
    const absl::Status status = ValidateCountMatrix(counts_, placement_, 8);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
  }

  Placement placement_ = EvenPlacement(2, 3);  // Rank 2 owns none.
  CountMatrix counts_{3, std::vector<std::int32_t>(9, 0), std::vector<std::int64_t>(2, 0)};
};

TEST_F(ValidateCountMatrixTest, EmptyBatchIsAccepted) {
  EXPECT_TRUE(ValidateCountMatrix(counts_, placement_, 8).ok());
}

TEST_F(ValidateCountMatrixTest, OtherNumberOfRanksIsRefused) {
  counts_.num_ranks = 2;
  ExpectRefused("num_ranks 2 is not the placement's 3");
}

TEST_F(ValidateCountMatrixTest, ShortRowsAreRefused) {
  counts_.rows.pop_back();
  ExpectRefused("rows has 8 entries");
}

TEST_F(ValidateCountMatrixTest, ShortRowsPerExpertAreRefused) {
  counts_.rows_per_expert.pop_back();
  ExpectRefused("rows_per_expert has 1 entries");
}

TEST_F(ValidateCountMatrixTest, NegativeRowsAreRefusedByName) {
  counts_.rows[1 * 3 + 0] = -1;
  ExpectRefused("rows[1][0] -1 is outside [0, 3]");
}

TEST_F(ValidateCountMatrixTest, MoreRowsThanASourceHasTokensAreRefused) {
  counts_.rows[0 * 3 + 1] = 4;
  ExpectRefused("rows[0][1] 4 is outside [0, 3]");
}

TEST_F(ValidateCountMatrixTest, MoreRowsThanABatchHasAreRefused) {
  for (int src = 0; src < 3; ++src) counts_.rows[src * 3] = 3;
  ExpectRefused("rank 0 receives 9 rows, which exceeds max_batch_tokens 8");
}

TEST_F(ValidateCountMatrixTest, RowsToARankWithoutExpertsAreRefused) {
  counts_.rows[0 * 3 + 2] = 1;
  ExpectRefused("rows[0][2] 1 goes to a rank that owns no expert");
}

TEST_F(ValidateCountMatrixTest, NegativeExpertRowsAreRefused) {
  counts_.rows_per_expert[1] = -5;
  ExpectRefused("rows_per_expert[1] -5 is negative");
}

}  // namespace
}  // namespace epserve::runtime
