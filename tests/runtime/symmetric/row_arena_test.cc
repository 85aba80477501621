#include "runtime/symmetric/row_arena.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

using testing::HasSubstr;

RowArenaSpec Spec() {
  RowArenaSpec spec;
  spec.cluster_id = absl::StrCat("arena-test-", ::getpid());
  spec.epoch = 7;
  spec.num_slots = 2;
  spec.max_batch_tokens = 5;
  spec.hidden = 3;
  spec.topk = 2;
  return spec;
}

TEST(RowArenaTest, WhatOneSideWritesTheOtherReads) {
  const auto own = RowArena::Create(Spec());
  ASSERT_TRUE(own.ok()) << own.status();
  const auto peer = RowArena::Open((*own)->handle(), Spec());
  ASSERT_TRUE(peer.ok()) << peer.status();
  ASSERT_EQ((*own)->num_blocks(), 6);
  for (int block = 0; block < 6; ++block) {
    std::memset((*own)->rows(block), 'a' + block, 5 * 3 * 2);
  }
  for (int slot = 0; slot < 2; ++slot) {
    for (int i = 0; i < 10; ++i) (*own)->topk_ids(slot)[i] = 100 * slot + i;
    for (int i = 0; i < 10; ++i) (*own)->topk_weights(slot)[i] = 0.5f * static_cast<float>(i);
  }
  for (int block = 0; block < 6; ++block) {
    const std::string rows(reinterpret_cast<const char*>((*peer)->rows(block)), 5 * 3 * 2);
    EXPECT_EQ(rows, std::string(30, static_cast<char>('a' + block)));
  }
  for (int slot = 0; slot < 2; ++slot) {
    EXPECT_EQ((*peer)->topk_ids(slot)[9], 100 * slot + 9);
    EXPECT_EQ((*peer)->topk_weights(slot)[9], 4.5f);
  }
  std::memset((*peer)->rows(2), 'z', 60);
  EXPECT_EQ(static_cast<char>((*own)->rows(2)[59]), 'z');
  EXPECT_EQ(static_cast<char>((*own)->rows(1)[29]), 'b');
}

TEST(RowArenaTest, SealedArenaCannotBeOpenedButStaysWithItsUsers) {
  const auto own = RowArena::Create(Spec());
  ASSERT_TRUE(own.ok()) << own.status();
  const auto peer = RowArena::Open((*own)->handle(), Spec());
  ASSERT_TRUE(peer.ok()) << peer.status();
  (*own)->Seal();
  EXPECT_EQ(RowArena::Open((*own)->handle(), Spec()).status().code(), absl::StatusCode::kNotFound);
  (*own)->topk_ids(1)[3] = 42;
  EXPECT_EQ((*peer)->topk_ids(1)[3], 42);
}

TEST(RowArenaTest, ArenaOfAnotherEpochOrShapeIsRefused) {
  const auto own = RowArena::Create(Spec());
  ASSERT_TRUE(own.ok()) << own.status();
  RowArenaSpec other = Spec();
  other.epoch = 8;
  const auto late = RowArena::Open((*own)->handle(), other);
  EXPECT_EQ(late.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(late.status().message()), HasSubstr("epoch 7"));
  other = Spec();
  other.topk = 3;
  EXPECT_EQ(RowArena::Open((*own)->handle(), other).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(RowArena::Open("no handle", Spec()).ok());
}

TEST(RowArenaTest, PlacesDoNotOverlapAndStayWithinTheArena) {
  const auto arena = RowArena::Create(Spec());
  ASSERT_TRUE(arena.ok()) << arena.status();
  std::set<const std::byte*> seen;
  std::size_t expected = 0;
  const auto add = [&](const void* begin, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) seen.insert(static_cast<const std::byte*>(begin) + i);
    expected += bytes;
  };
  for (int block = 0; block < 6; ++block) add((*arena)->rows(block), 30);
  for (int slot = 0; slot < 2; ++slot) {
    add((*arena)->topk_ids(slot), 40);
    add((*arena)->topk_weights(slot), 40);
  }
  EXPECT_EQ(seen.size(), expected);
  EXPECT_LE(static_cast<std::uint64_t>(*seen.rbegin() - *seen.begin()), RowArena::Bytes(Spec()));
}

TEST(RowArenaTest, PairOfBlocksHoldsRowsOfFourBytesAnElement) {
  RowArenaSpec spec = Spec();
  spec.max_batch_tokens = 100;
  const auto arena = RowArena::Create(spec);
  ASSERT_TRUE(arena.ok()) << arena.status();
  const std::uint64_t block_bytes = (*arena)->block_bytes();
  EXPECT_GE(block_bytes, 100u * 3 * 2);
  EXPECT_EQ((*arena)->rows(3) - (*arena)->rows(2), static_cast<std::ptrdiff_t>(block_bytes));
  EXPECT_TRUE((*arena)->Holds(4, 2 * block_bytes));
  EXPECT_FALSE((*arena)->Holds(4, 2 * block_bytes + 1));
  EXPECT_TRUE((*arena)->Holds(5, block_bytes));
  EXPECT_FALSE((*arena)->Holds(5, block_bytes + 1));
  EXPECT_FALSE((*arena)->Holds(6, 0));
  EXPECT_FALSE((*arena)->Holds(-1, 0));
}

}  // namespace
}  // namespace epserve::runtime
