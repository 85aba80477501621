#include "runtime/alltoallv/combine_blocks.h"

#include <gtest/gtest.h>

namespace epserve::runtime {
namespace {

TEST(DivideCombineBlocksTest, TwoRanksReduceMoreThanTheyPush) {
  const CombineBlocks blocks = DivideCombineBlocks(48, 2, 8);
  EXPECT_EQ(blocks.push, 20);
  EXPECT_EQ(blocks.reduce, 28);
  EXPECT_EQ(DivideCombineBlocks(48, 2, 4).push, 18);
}

TEST(DivideCombineBlocksTest, MoreRanksPushMore) {
  EXPECT_EQ(DivideCombineBlocks(48, 4, 8).push, 24);
  EXPECT_GT(DivideCombineBlocks(48, 8, 8).push, DivideCombineBlocks(48, 2, 8).push);
}

TEST(DivideCombineBlocksTest, NoBlockIsLostAndEachRoleHasOne) {
  for (int total = 2; total <= 256; ++total) {
    for (int ranks = 1; ranks <= 8; ++ranks) {
      for (int topk = 1; topk <= 16; ++topk) {
        const CombineBlocks blocks = DivideCombineBlocks(total, ranks, topk);
        ASSERT_EQ(blocks.push + blocks.reduce, total);
        ASSERT_GE(blocks.push, 1) << total << " blocks, " << ranks << " ranks, top-" << topk;
        ASSERT_GE(blocks.reduce, 1) << total << " blocks, " << ranks << " ranks, top-" << topk;
      }
    }
  }
}

}  // namespace
}  // namespace epserve::runtime
