// Dispatch and combine against the plain reference, ranks as threads.
#include "runtime/alltoallv/host_exchange.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "tests/runtime/alltoallv/exchange_reference.h"

namespace epserve::runtime {
namespace {

constexpr DataType kTypes[] = {DataType::kFp32, DataType::kFp16, DataType::kBf16};

void ExpectReference(Cluster* cluster, int slot, std::uint64_t sequence, const Batch& batch) {
  const auto out = cluster->Run(slot, sequence, batch);
  ASSERT_TRUE(out.ok()) << out.status();
  ASSERT_EQ(*out, Reference(batch, cluster->config().placement));
}

TEST(HostExchangeTest, RandomShapesGiveTheReferencesBits) {
  std::mt19937 random(2024);
  for (int round = 0; round < 60; ++round) {
    const int ranks = 1 + static_cast<int>(random() % 6);
    const std::int64_t experts = 1 + static_cast<std::int64_t>(random() % 20);
    const std::int64_t hidden = 1 + static_cast<std::int64_t>(random() % 200);
    const std::int64_t max_tokens = 1 + static_cast<std::int64_t>(random() % 60);
    auto cluster = Cluster::Create(TestConfig(ranks, experts, max_tokens, hidden));
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    for (std::uint64_t sequence = 1; sequence <= 4; ++sequence) {
      const std::int64_t tokens = static_cast<std::int64_t>(random() % (max_tokens + 1));
      const int topk = 1 + static_cast<int>(random() % 16);
      SCOPED_TRACE(absl::StrCat("ranks ", ranks, " experts ", experts, " hidden ", hidden,
                                " tokens ", tokens, " topk ", topk));
      ExpectReference(cluster->get(), static_cast<int>(sequence % 2), sequence,
                      RandomBatch(&random, kTypes[sequence % 3], tokens, hidden, topk, experts));
    }
  }
}

TEST(HostExchangeTest, EveryTopkFromOneToSixteenGivesTheReferencesBits) {
  std::mt19937 random(1);
  auto cluster = Cluster::Create(TestConfig(4, 14, 40, 64));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  for (int topk = 1; topk <= 16; ++topk) {
    ExpectReference(cluster->get(), 0, topk,
                    RandomBatch(&random, DataType::kBf16, 37, 64, topk, 14));
  }
}

TEST(HostExchangeTest, NoTokensAndFewerTokensThanRanksAreOrdinary) {
  std::mt19937 random(2);
  auto cluster = Cluster::Create(TestConfig(5, 10, 20, 32));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  for (std::int64_t tokens = 0; tokens < 5; ++tokens) {
    ExpectReference(cluster->get(), 0, tokens + 1,
                    RandomBatch(&random, DataType::kFp32, tokens, 32, 3, 10));
  }
}

TEST(HostExchangeTest, AllTokensOnOneExpertAtTheSizeLimitAreOrdinary) {
  std::mt19937 random(3);
  auto cluster = Cluster::Create(TestConfig(4, 8, 64, 48));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Batch batch = RandomBatch(&random, DataType::kFp32, 64, 48, 2, 8);
  for (std::int32_t& id : batch.topk_ids) id = 5;  // Twice in each row, too.
  ExpectReference(cluster->get(), 0, 1, batch);
}

TEST(HostExchangeTest, TokensWithoutExpertsGetZeros) {
  std::mt19937 random(4);
  auto cluster = Cluster::Create(TestConfig(3, 6, 12, 16));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Batch batch = RandomBatch(&random, DataType::kBf16, 12, 16, 4, 6);
  for (std::int32_t& id : batch.topk_ids) id = -1;
  const auto out = (*cluster)->Run(0, 1, batch);
  ASSERT_TRUE(out.ok()) << out.status();
  for (const std::byte byte : *out) ASSERT_EQ(byte, std::byte{0});
}

TEST(HostExchangeTest, RanksWithoutExpertsStillSendAndReceiveTheirTokens) {
  std::mt19937 random(5);
  auto cluster = Cluster::Create(TestConfig(6, 2, 30, 24));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  ExpectReference(cluster->get(), 0, 1, RandomBatch(&random, DataType::kFp16, 29, 24, 2, 2));
}

TEST(HostExchangeTest, BatchesLargerThanTheCachesTakeTheStreamedPathAndGiveTheReferencesBits) {
  std::mt19937 random(6);
  constexpr std::int64_t kHidden = 1031;  // Rows that end in the middle of a cache line.
  auto cluster = Cluster::Create(TestConfig(2, 4, 1200, kHidden));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  for (std::uint64_t sequence = 1; sequence <= 3; ++sequence) {
    ExpectReference(cluster->get(), 0, sequence,
                    RandomBatch(&random, kTypes[sequence % 3], 1200, kHidden, 4, 4));
  }
}

// Rank 0's tokens go to rank 1 and rank 2 by turns, of which the second is late.
TEST(HostExchangeTest, LargeShardsTokensAreSummedWhileTheRanksOfOthersStillWork) {
  constexpr int kRanks = 3;
  constexpr std::int64_t kTokens = 1200;
  constexpr std::int64_t kHidden = 1031;
  std::mt19937 random(16);
  auto cluster = Cluster::Create(TestConfig(kRanks, kRanks, kTokens, kHidden));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Batch batch = RandomBatch(&random, DataType::kFp32, kTokens, kHidden, 1, kRanks);
  for (std::int64_t t = 0; t < kTokens; ++t) batch.topk_ids[t] = t < 400 ? 1 + t % 2 : 0;
  const Placement& placement = (*cluster)->config().placement;
  const CountMatrix counts = ComputeCountMatrix(batch.topk_ids, kTokens, batch.topk, placement);
  const std::vector<std::byte> expected = Reference(batch, placement);
  // Written by one view and read by another.
  const ManyMappings out(std::vector<std::byte>(batch.x.size(), std::byte{0xa5}), 2);
  const auto row_is = [&](std::int64_t t, const std::byte* wanted) {
    return std::memcmp(out.view(1) + t * batch.row_bytes(), wanted, batch.row_bytes()) == 0;
  };
  const std::vector<std::byte> poison(batch.row_bytes(), std::byte{0xa5});

  std::atomic<bool> last_may_go{false};
  std::atomic<bool> first_is_through{false};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      HostExchange& exchange = (*cluster)->rank(rank);
      const absl::Status sent = exchange.Dispatch(ShardArgs(batch, counts, 0, 1, kRanks, rank));
      EXPECT_TRUE(sent.ok()) << sent;
      if (!sent.ok()) return;
      RunStandIn(exchange.Received(0), kHidden, placement.first_expert[rank]);
      while (rank == 2 && !last_may_go.load()) std::this_thread::yield();
      const std::int64_t begin = ShardOf(kTokens, kRanks, rank).begin;
      const absl::Status summed = exchange.Combine(0, out.view(0) + begin * batch.row_bytes());
      EXPECT_TRUE(summed.ok()) << summed;
      if (rank == 0) first_is_through.store(true);
    });
  }
  for (std::int64_t t = 0; t < 400; t += 2) {
    const std::byte* const sum = expected.data() + t * batch.row_bytes();
    bool is_summed = row_is(t, sum);
    while (!is_summed && !first_is_through.load()) {
      std::this_thread::yield();
      is_summed = row_is(t, sum);
    }
    EXPECT_TRUE(is_summed) << t;
    EXPECT_TRUE(row_is(t + 1, poison.data())) << t + 1;
  }
  EXPECT_FALSE(first_is_through.load());
  last_may_go.store(true);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(std::memcmp(out.view(1), expected.data(), expected.size()), 0);
}

TEST(HostExchangeTest, RowsARankSendsToItselfAreNotCopied) {
  std::mt19937 random(7);
  auto cluster = Cluster::Create(TestConfig(1, 4, 8, 16));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Batch batch = RandomBatch(&random, DataType::kFp32, 8, 16, 2, 4);
  for (std::int32_t& id : batch.topk_ids) id = 1;
  const CountMatrix counts =
      ComputeCountMatrix(batch.topk_ids, 8, 2, (*cluster)->config().placement);
  ASSERT_TRUE((*cluster)->rank(0).Dispatch(ShardArgs(batch, counts, 0, 1, 1, 0)).ok());
  const ReceivedRows& received = (*cluster)->rank(0).Received(0);
  ASSERT_EQ(received.num_rows, 8);
  for (int t = 0; t < 8; ++t) {
    EXPECT_EQ(received.rows[t], batch.x.data() + t * batch.row_bytes());
  }
}

TEST(HostExchangeTest, SameBatchTwiceGivesTheSameBits) {
  std::mt19937 random(8);
  auto cluster = Cluster::Create(TestConfig(4, 12, 100, 256));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  const Batch batch = RandomBatch(&random, DataType::kFp32, 100, 256, 8, 12);
  const auto first = (*cluster)->Run(0, 1, batch);
  ASSERT_TRUE(first.ok());
  for (std::uint64_t sequence = 2; sequence < 20; ++sequence) {
    const auto again = (*cluster)->Run(static_cast<int>(sequence % 2), sequence, batch);
    ASSERT_TRUE(again.ok());
    ASSERT_EQ(*again, *first);
  }
}

TEST(HostExchangeTest, NanAndInfStayInTheirToken) {
  std::mt19937 random(9);
  auto cluster = Cluster::Create(TestConfig(3, 6, 24, 40));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Batch batch = RandomBatch(&random, DataType::kFp32, 24, 40, 3, 6);
  const auto clean = (*cluster)->Run(0, 1, batch);
  ASSERT_TRUE(clean.ok());
  constexpr std::int64_t kBadTokens[] = {0, 11};
  for (const std::int64_t token : kBadTokens) {
    auto* row = reinterpret_cast<float*>(batch.x.data() + token * batch.row_bytes());
    row[3] = std::numeric_limits<float>::quiet_NaN();
    row[4] = std::numeric_limits<float>::infinity();
    batch.topk_ids[token * batch.topk] = 2;
  }
  const auto dirty = (*cluster)->Run(0, 2, batch);
  ASSERT_TRUE(dirty.ok());
  for (std::int64_t t = 0; t < 24; ++t) {
    const bool same = std::memcmp(clean->data() + t * batch.row_bytes(),
                                  dirty->data() + t * batch.row_bytes(), batch.row_bytes()) == 0;
    EXPECT_EQ(same, t != kBadTokens[0] && t != kBadTokens[1]) << t;
  }
}

TEST(HostExchangeTest, TwoSlotsAtOnceDoNotDisturbEachOther) {
  constexpr std::uint64_t kBatches = 40;
  ExchangeConfig config = TestConfig(4, 9, 48, 72);
  auto cluster = Cluster::Create(config);
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  std::vector<std::thread> slots;
  std::vector<std::uint64_t> good(2, 0);
  for (int slot = 0; slot < 2; ++slot) {
    slots.emplace_back([&, slot] {
      std::mt19937 random(100 + slot);
      for (std::uint64_t i = 0; i < kBatches; ++i) {
        const Batch batch =
            RandomBatch(&random, kTypes[(i + slot) % 3], static_cast<std::int64_t>(random() % 49),
                        72, 1 + static_cast<int>(random() % 8), 9);
        // The slots share the epoch's sequence: even batches to one, odd ones to the other.
        const auto out = (*cluster)->Run(slot, 2 * i + slot + 1, batch);
        if (out.ok() && *out == Reference(batch, config.placement)) ++good[slot];
      }
    });
  }
  for (std::thread& slot : slots) slot.join();
  EXPECT_EQ(good[0], kBatches);
  EXPECT_EQ(good[1], kBatches);
}

TEST(HostExchangeTest, ManyMoreRanksThanCoresFinish) {
  std::mt19937 random(10);
  auto cluster = Cluster::Create(TestConfig(32, 64, 320, 16));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  for (std::uint64_t sequence = 1; sequence <= 3; ++sequence) {
    ExpectReference(cluster->get(), 0, sequence,
                    RandomBatch(&random, DataType::kBf16, 320, 16, 8, 64));
  }
}

}  // namespace
}  // namespace epserve::runtime
