// The count exchange through the ranks' heaps, held against plain counting; and how it fails.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "tests/runtime/alltoallv/exchange_reference.h"

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

// Token by token with sets, knowing nothing of masks and records.
CountMatrix PlainCounts(const Batch& batch, const Placement& placement) {
  const int ranks = placement.num_ranks();
  CountMatrix matrix;
  matrix.num_ranks = ranks;
  matrix.rows.resize(static_cast<std::size_t>(ranks * ranks));
  matrix.rows_per_expert.resize(static_cast<std::size_t>(placement.num_experts()));
  for (int source = 0; source < ranks; ++source) {
    const RowRange shard = ShardOf(batch.num_tokens, ranks, source);
    for (std::int64_t t = shard.begin; t < shard.end; ++t) {
      std::set<int> receivers;
      for (int k = 0; k < batch.topk; ++k) {
        const std::int32_t id = batch.topk_ids[static_cast<std::size_t>(t * batch.topk + k)];
        if (id < 0) continue;
        ++matrix.rows_per_expert[static_cast<std::size_t>(id)];
        int owner = 0;
        while (placement.first_expert[static_cast<std::size_t>(owner) + 1] <= id) ++owner;
        receivers.insert(owner);
      }
      for (const int receiver : receivers) {
        ++matrix.rows[static_cast<std::size_t>(source * ranks + receiver)];
      }
    }
  }
  return matrix;
}

// All ranks exchange the batch's counts at once; every one must get the plain matrix.
void ExpectPlainMatrix(Cluster& cluster, int slot, std::uint64_t sequence, const Batch& batch) {
  const Placement& placement = cluster.config().placement;
  const CountMatrix expected = PlainCounts(batch, placement);
  std::vector<absl::StatusOr<CountMatrix>> got(static_cast<std::size_t>(placement.num_ranks()));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      got[static_cast<std::size_t>(rank)] =
          cluster.rank(rank).ExchangeCounts(slot, sequence, CountsOf(batch, placement, rank));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& matrix : got) {
    ASSERT_TRUE(matrix.ok()) << matrix.status();
    EXPECT_EQ(matrix->num_ranks, expected.num_ranks);
    EXPECT_EQ(matrix->rows, expected.rows);
    EXPECT_EQ(matrix->rows_per_expert, expected.rows_per_expert);
  }
}

TEST(HostCountsTest, EveryRankGetsThePlainMatrixOfRandomBatches) {
  std::mt19937 random(11);
  for (int round = 0; round < 40; ++round) {
    const int ranks = 1 + static_cast<int>(random() % 6);
    const std::int64_t experts = 1 + static_cast<std::int64_t>(random() % 20);
    const std::int64_t max_tokens = 1 + static_cast<std::int64_t>(random() % 60);
    auto cluster = Cluster::Create(TestConfig(ranks, experts, max_tokens, 4));
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    for (std::uint64_t sequence = 1; sequence <= 4; ++sequence) {
      const auto tokens = static_cast<std::int64_t>(random() % (max_tokens + 1));
      const int topk = 1 + static_cast<int>(random() % 16);
      SCOPED_TRACE(
          absl::StrCat("ranks ", ranks, " experts ", experts, " tokens ", tokens, " topk ", topk));
      ExpectPlainMatrix(**cluster, static_cast<int>(sequence % 2), sequence,
                        RandomBatch(&random, DataType::kFp32, tokens, 4, topk, experts));
    }
  }
}

TEST(HostCountsTest, EveryTopkSkewAndEmptyShardIsOrdinary) {
  std::mt19937 random(12);
  auto cluster = Cluster::Create(TestConfig(5, 13, 40, 4));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  std::uint64_t sequence = 0;
  for (int topk = 1; topk <= 16; ++topk) {
    ExpectPlainMatrix(**cluster, 0, ++sequence,
                      RandomBatch(&random, DataType::kFp32, 37, 4, topk, 13));
  }
  for (const std::int32_t id : {-1, 12}) {  // Nobody's, or all one's.
    Batch batch = RandomBatch(&random, DataType::kFp32, 40, 4, 3, 13);
    for (std::int32_t& each : batch.topk_ids) each = id;
    ExpectPlainMatrix(**cluster, 0, ++sequence, batch);
  }
  for (std::int64_t tokens = 0; tokens < 5; ++tokens) {  // Shards without a token.
    ExpectPlainMatrix(**cluster, 0, ++sequence,
                      RandomBatch(&random, DataType::kFp32, tokens, 4, 2, 13));
  }
}

TEST(HostCountsTest, RanksWithoutExpertsTakePart) {
  std::mt19937 random(13);
  auto cluster = Cluster::Create(TestConfig(6, 2, 30, 4));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  ExpectPlainMatrix(**cluster, 0, 1, RandomBatch(&random, DataType::kFp32, 29, 4, 2, 2));
}

TEST(HostCountsTest, TwoSlotsAtOnceWithWholeBatchesBetweenDoNotDisturbEachOther) {
  auto cluster = Cluster::Create(TestConfig(4, 9, 48, 8));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  std::vector<std::thread> slots;
  for (int slot = 0; slot < 2; ++slot) {
    slots.emplace_back([&, slot] {
      std::mt19937 random(100 + static_cast<std::uint32_t>(slot));
      for (std::uint64_t i = 0; i < 40; ++i) {
        const Batch batch = RandomBatch(&random, DataType::kFp32, static_cast<int>(random() % 49),
                                        8, 1 + static_cast<int>(random() % 8), 9);
        const std::uint64_t sequence = 2 * i + static_cast<std::uint64_t>(slot) + 1;
        ExpectPlainMatrix(**cluster, slot, sequence, batch);
        // Flags of rows and of counts are raised by the same sequence.
        const auto out = (*cluster)->Run(slot, sequence, batch);
        ASSERT_TRUE(out.ok()) << out.status();
        ASSERT_EQ(*out, Reference(batch, (*cluster)->config().placement));
      }
    });
  }
  for (std::thread& slot : slots) slot.join();
}

// ---- faults

// Two ranks, of which the tests drive rank 0; rank 1 does what a test makes it do.
class HostCountsFaultsTest : public testing::Test {
 protected:
  void SetUp() override { Open(absl::Seconds(60)); }

  void Open(absl::Duration timeout) {
    ExchangeConfig config = TestConfig(2, 4, 16, 8);
    config.peer_timeout = timeout;
    auto cluster = Cluster::Create(config);
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = *std::move(cluster);
  }

  static void ExpectStatus(const absl::StatusOr<CountMatrix>& got, absl::StatusCode code,
                           const std::string& part) {
    EXPECT_EQ(got.status().code(), code) << got.status();
    EXPECT_THAT(std::string(got.status().message()), HasSubstr(part));
  }

  std::unique_ptr<Cluster> cluster_;
  ShardCounts counts_{{3, 4}, {1, 2, 3, 4}};
};

TEST_F(HostCountsFaultsTest, ArgumentsOutsideTheConfigAreRefusedByName) {
  const auto expect = [&](int slot, std::uint64_t sequence, const std::string& part) {
    ExpectStatus(cluster_->rank(0).ExchangeCounts(slot, sequence, counts_),
                 absl::StatusCode::kInvalidArgument, part);
  };
  expect(2, 1, "counts: slot 2 is outside [0, 2)");
  expect(-1, 1, "counts: slot -1 is outside [0, 2)");
  expect(0, 0, "counts: sequence 0 does not exceed 0");
  counts_ = {{3}, {1, 2, 3, 4}};
  expect(0, 1, "counts: 1 ranks and 4 experts are not the 2 and 4");
  counts_ = {{3, 4}, {1, 2, 3}};
  expect(0, 1, "counts: 2 ranks and 3 experts are not the 2 and 4");
  counts_ = {{3, 9}, {1, 2, 3, 4}};
  expect(0, 1, "counts: rows_to_rank[1] 9 is outside [0, 8]");
  counts_ = {{-1, 4}, {1, 2, 3, 4}};
  expect(0, 1, "counts: rows_to_rank[0] -1 is outside [0, 8]");
  counts_ = {{3, 4}, {1, 2, 3, 129}};
  expect(0, 1, "counts: rows_per_expert[3] 129 is outside [0, 128]");
  auto closed = HostExchange::Create(TestConfig(1, 4, 16, 8));
  ASSERT_TRUE(closed.ok());
  ExpectStatus((*closed)->ExchangeCounts(0, 1, {{3}, {1, 2, 3, 4}}),
               absl::StatusCode::kFailedPrecondition, "peers are not open");
}

TEST_F(HostCountsFaultsTest, SequencesOnlyGrow) {
  std::thread peer([&] { EXPECT_TRUE(cluster_->rank(1).ExchangeCounts(0, 5, counts_).ok()); });
  EXPECT_TRUE(cluster_->rank(0).ExchangeCounts(0, 5, counts_).ok());
  peer.join();
  ExpectStatus(cluster_->rank(0).ExchangeCounts(0, 5, counts_), absl::StatusCode::kInvalidArgument,
               "counts: sequence 5 does not exceed 5, the last one of slot 0");
}

TEST_F(HostCountsFaultsTest, SilentPeerTimesOutByName) {
  Open(absl::Milliseconds(50));
  const auto begin = std::chrono::steady_clock::now();
  const auto got = cluster_->rank(0).ExchangeCounts(1, 7, counts_);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(50));
  ExpectStatus(got, absl::StatusCode::kDeadlineExceeded, "counts: rank 0 waited ");
  ExpectStatus(got, absl::StatusCode::kDeadlineExceeded,
               " ms for rank 1 (epoch 1, slot 1, batch 7), which exceeds peer_timeout 50 ms");
}

TEST_F(HostCountsFaultsTest, CountsOfAnEarlierBatchAreNotTaken) {
  Open(absl::Milliseconds(50));
  // Rank 1 tells its counts before it waits, so rank 0 need not meet it within the timeout.
  ExpectStatus(cluster_->rank(1).ExchangeCounts(0, 1, counts_), absl::StatusCode::kDeadlineExceeded,
               "for rank 0");
  EXPECT_TRUE(cluster_->rank(0).ExchangeCounts(0, 1, counts_).ok());
  ExpectStatus(cluster_->rank(0).ExchangeCounts(0, 3, counts_), absl::StatusCode::kDeadlineExceeded,
               "for rank 1");
}

TEST_F(HostCountsFaultsTest, PeerAtAnotherBatchIsFoundOut) {
  absl::StatusOr<CountMatrix> ahead;
  std::thread peer([&] { ahead = cluster_->rank(1).ExchangeCounts(0, 2, counts_); });
  ExpectStatus(cluster_->rank(0).ExchangeCounts(0, 1, counts_), absl::StatusCode::kInternal,
               "counts: rank 1 told those of batch 2, expected batch 1");
  cluster_->rank(1).Abort();
  peer.join();
  ExpectStatus(ahead, absl::StatusCode::kAborted, "counts: rank 1 of epoch 1 was aborted");
}

TEST_F(HostCountsFaultsTest, AbortEndsTheWaitAndAllLaterOnes) {
  absl::StatusOr<CountMatrix> waited;
  const auto begin = std::chrono::steady_clock::now();
  std::thread waiter([&] { waited = cluster_->rank(0).ExchangeCounts(0, 1, counts_); });
  cluster_->rank(0).Abort();
  waiter.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
  ExpectStatus(waited, absl::StatusCode::kAborted, "counts: rank 0 of epoch 1 was aborted");
  ExpectStatus(cluster_->rank(0).ExchangeCounts(0, 2, counts_), absl::StatusCode::kAborted,
               "was aborted");
}

TEST_F(HostCountsFaultsTest, AfterAnAbortNothingReachesAPeer) {
  Open(absl::Milliseconds(50));
  cluster_->rank(0).Abort();
  ExpectStatus(cluster_->rank(0).ExchangeCounts(0, 1, counts_), absl::StatusCode::kAborted,
               "was aborted");
  // Had rank 0 raised its flag, rank 1 would have its counts.
  ExpectStatus(cluster_->rank(1).ExchangeCounts(0, 1, counts_), absl::StatusCode::kDeadlineExceeded,
               "for rank 0");
}

}  // namespace
}  // namespace epserve::runtime
