#include "server/coordinator/row_blocks.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

constexpr int kSlots = 2;

class RowBlocksTest : public testing::Test {
 protected:
  void SetUp() override {
    runtime::RowArenaSpec spec;
    spec.cluster_id = absl::StrCat("row-blocks-", ::getpid());
    spec.epoch = 1;
    spec.num_slots = kSlots;
    spec.max_batch_tokens = 128;
    spec.hidden = 1;
    spec.topk = 1;
    auto arena = runtime::RowArena::Create(spec);
    ASSERT_TRUE(arena.ok()) << arena.status();
    arena_ = *arena;
    block_bytes_ = arena_->block_bytes();
    blocks_ = std::make_shared<RowBlocks>(*std::move(arena), kSlots, lender_);
  }

  std::weak_ptr<runtime::RowArena> watched() { return std::exchange(arena_, nullptr); }

  std::shared_ptr<runtime::RowArena> arena_;
  std::uint64_t block_bytes_ = 0;
  const std::shared_ptr<Lender> lender_ = std::make_shared<Lender>();
  std::shared_ptr<RowBlocks> blocks_;
};

TEST_F(RowBlocksTest, OnlyOneEpochHasLentRowsAtATime) {
  const auto later = std::make_shared<RowBlocks>(arena_, kSlots, lender_);
  auto held = blocks_->Take(block_bytes_);
  auto beside = blocks_->Take(block_bytes_);
  auto held_later = later->Take(block_bytes_);
  ASSERT_TRUE(held->Lend());
  EXPECT_TRUE(beside->Lend());
  EXPECT_FALSE(held_later->Lend());
  held.reset();
  EXPECT_FALSE(held_later->Lend());
  beside.reset();
  EXPECT_TRUE(held_later->Lend());
  EXPECT_FALSE(blocks_->Take(block_bytes_)->Lend());
}

TEST_F(RowBlocksTest, BatchTakesOneBlockOrAPairAndGivesThemBack) {
  auto small = blocks_->Take(block_bytes_);
  auto large = blocks_->Take(block_bytes_ + 1);
  ASSERT_NE(small, nullptr);
  ASSERT_NE(large, nullptr);
  EXPECT_EQ(small->first(), 0);
  EXPECT_EQ(large->first(), 2);
  EXPECT_EQ(large->rows(), arena_->rows(2));
  auto other = blocks_->Take(2 * block_bytes_);
  EXPECT_EQ(other->first(), 4);
  EXPECT_EQ(blocks_->Take(2 * block_bytes_), nullptr);
  large.reset();
  EXPECT_EQ(blocks_->Take(2 * block_bytes_)->first(), 2);
}

TEST_F(RowBlocksTest, LentRowsStayUntilTheLastCallerHasThem) {
  auto held = blocks_->Take(block_bytes_);
  ASSERT_TRUE(held->Lend());
  const std::shared_ptr<const void> first_caller = held;
  std::shared_ptr<const void> last_caller = held;
  std::memset(held->rows(), 'x', block_bytes_);
  held.reset();
  for (int i = 0; i < 4; ++i) {
    const auto next = blocks_->Take(block_bytes_);
    EXPECT_NE(next->first(), 0);
    std::memset(next->rows(), 'y', block_bytes_);
  }
  EXPECT_EQ(static_cast<char>(arena_->rows(0)[block_bytes_ - 1]), 'x');
  last_caller.reset();
  EXPECT_NE(blocks_->Take(block_bytes_)->first(), 0) << "another caller has rows of it";
}

// A caller that never takes its reply.
TEST_F(RowBlocksTest, WhatIsLentLeavesEachSlotAPair) {
  auto lent = blocks_->Take(2 * block_bytes_);
  ASSERT_TRUE(lent->Lend());
  EXPECT_TRUE(lent->Lend()) << "to another caller of the same batch";
  auto second = blocks_->Take(block_bytes_);
  EXPECT_FALSE(second->Lend());
  auto third = blocks_->Take(2 * block_bytes_);
  ASSERT_NE(third, nullptr);
  EXPECT_FALSE(third->Lend());
  lent.reset();
  EXPECT_TRUE(third->Lend());
}

TEST_F(RowBlocksTest, OneBlockIsTakenBesideALentOneSoThatBothCanBe) {
  auto beside = blocks_->Take(block_bytes_);
  auto away = blocks_->Take(2 * block_bytes_);
  auto lent = blocks_->Take(block_bytes_);
  ASSERT_EQ(away->first(), 2);
  ASSERT_TRUE(away->Lend());
  beside.reset();
  away.reset();
  ASSERT_EQ(lent->first(), 1);
  ASSERT_TRUE(lent->Lend());
  auto next = blocks_->Take(block_bytes_);
  EXPECT_EQ(next->first(), 0);
  EXPECT_TRUE(next->Lend());
  EXPECT_FALSE(blocks_->Take(block_bytes_)->Lend());
}

TEST_F(RowBlocksTest, SlotsAlwaysFindAPairWhateverIsLent) {
  std::mt19937 random(20260);
  std::vector<std::shared_ptr<RowBlocks::Held>> batches;
  std::vector<std::shared_ptr<RowBlocks::Held>> callers;
  int num_lent = 0;
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 4 == 0 && !callers.empty()) {
      callers.erase(callers.begin() + static_cast<std::ptrdiff_t>(random() % callers.size()));
    } else if (batches.size() < kSlots) {
      batches.push_back(blocks_->Take((1 + random() % 2) * block_bytes_));
      ASSERT_NE(batches.back(), nullptr) << step;
    } else {
      const auto ended = batches.begin() + static_cast<std::ptrdiff_t>(random() % batches.size());
      if ((*ended)->Lend()) {
        callers.push_back(*ended);
        ++num_lent;
      }
      batches.erase(ended);
    }
  }
  EXPECT_GT(num_lent, 1000);
}

TEST_F(RowBlocksTest, ArenaStaysMappedUntilItsLastBlockIsGivenBack) {
  auto lent = blocks_->Take(block_bytes_);
  ASSERT_TRUE(lent->Lend());
  const std::weak_ptr<runtime::RowArena> arena = watched();
  blocks_.reset();
  EXPECT_FALSE(arena.expired());
  lent->rows()[block_bytes_ - 1] = std::byte{1};
  lent.reset();
  EXPECT_TRUE(arena.expired());
}

}  // namespace
}  // namespace epserve::coordinator
