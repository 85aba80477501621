#include "server/coordinator/kept_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {
namespace {

constexpr std::int64_t kTokens = 600;
constexpr std::int64_t kRowBytes = 4096;

// Two requests, of 256 rows and of the rest, which two ranks have answered in the arena.
class KeptBatchTest : public testing::Test {
 protected:
  void SetUp() override {
    runtime::RowArenaSpec spec;
    spec.cluster_id = absl::StrCat("kept-batch-", ::getpid());
    spec.epoch = 1;
    spec.num_slots = 1;
    spec.max_batch_tokens = kTokens;
    spec.hidden = kRowBytes / 2;
    spec.topk = 1;
    auto arena = runtime::RowArena::Create(spec);
    ASSERT_TRUE(arena.ok()) << arena.status();
    blocks_ =
        std::make_shared<RowBlocks>(*std::move(arena), spec.num_slots, std::make_shared<Lender>());
    batch_.row_bytes = kRowBytes;
    batch_.shards = {{0, 11, {0, 300}}, {1, 12, {300, kTokens}}};
    batch_.outputs.resize(2);
    batch_.taken = {true, true};
    batch_.in_arena = {true, true};
    batch_.direct = {false, false};
    batch_.blocks = blocks_->Take(kTokens * kRowBytes);
    for (std::int64_t row = 0; row < kTokens; ++row) {
      std::memset(batch_.blocks->rows() + row * kRowBytes, static_cast<int>(row % 251), kRowBytes);
    }
    batch_.parts.resize(2);
    batch_.parts[0].rows = {0, 256};
    batch_.parts[1].rows = {256, kTokens};
  }

  static void ExpectRowsOf(const KeptPart& part, std::span<const char> rows) {
    ASSERT_EQ(static_cast<std::int64_t>(rows.size()), part.rows.size() * kRowBytes);
    for (std::int64_t i = 0; i < part.rows.size(); ++i) {
      const auto value = static_cast<char>((part.rows.begin + i) % 251);
      ASSERT_EQ(rows[static_cast<std::size_t>(i * kRowBytes)], value) << i;
      ASSERT_EQ(rows[static_cast<std::size_t>((i + 1) * kRowBytes - 1)], value) << i;
    }
  }

  std::shared_ptr<RowBlocks> blocks_;
  KeptBatch batch_;
};

TEST_F(KeptBatchTest, LargeOutputsAreLentWhereTheyAreAndStayAfterTheBatch) {
  std::optional<LentRows> first = LendOutput(batch_, batch_.parts[0]);
  std::optional<LentRows> second = LendOutput(batch_, batch_.parts[1]);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(static_cast<const void*>(first->rows.data()), batch_.blocks->rows());
  const int taken = batch_.blocks->first();
  const std::vector<KeptPart> parts = batch_.parts;
  batch_ = KeptBatch();
  ExpectRowsOf(parts[0], first->rows);
  first.reset();
  const auto next = blocks_->Take(kTokens * kRowBytes);
  EXPECT_NE(next->first(), taken);
  ExpectRowsOf(parts[1], second->rows);
  second.reset();
  EXPECT_EQ(blocks_->Take(kTokens * kRowBytes)->first(), taken);
}

TEST_F(KeptBatchTest, WhatCannotBeLentIsCopied) {
  KeptPart& part = batch_.parts[1];
  const auto never_taken = blocks_->Take(2 * kTokens * kRowBytes);
  ASSERT_TRUE(never_taken->Lend());
  EXPECT_FALSE(LendOutput(batch_, part).has_value());
  std::vector<char> rows(static_cast<std::size_t>(part.rows.size() * kRowBytes));
  ASSERT_TRUE(DeliverOutput(batch_, part, rows).ok());
  ExpectRowsOf(part, rows);
}

TEST_F(KeptBatchTest, OnlyWholeOutputsOfSomeSizeAreLent) {
  KeptPart& part = batch_.parts[1];
  const auto lends = [&] { return LendOutput(batch_, part).has_value(); };
  part.rows = {300, 300 + 255};
  EXPECT_FALSE(lends()) << "it is small";
  part.rows = {300, kTokens};
  batch_.taken[0] = false;
  EXPECT_TRUE(lends()) << "none of its rows are rank 0's";
  batch_.taken = {true, false};
  EXPECT_FALSE(lends()) << "its rows have not come";
  batch_.taken = {true, true};
  batch_.in_arena[1] = false;
  EXPECT_FALSE(lends()) << "its rows came in a message";
  batch_.in_arena[1] = true;
  part.fault = absl::DataLossError("region");
  EXPECT_FALSE(lends());
  part.fault = absl::OkStatus();
  batch_.blocks = nullptr;
  batch_.in_arena = {false, false};
  EXPECT_FALSE(lends());
}

}  // namespace
}  // namespace epserve::coordinator
