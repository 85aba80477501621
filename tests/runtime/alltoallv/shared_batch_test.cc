// Batches that every rank sees: the pushed form's bits, and what is refused.
#include "runtime/alltoallv/shared_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/runtime/alltoallv/exchange_reference.h"

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

constexpr DataType kBatchTypes[] = {DataType::kFp32, DataType::kFp16, DataType::kBf16};

// A division of the batch whose shards are as long as they may be, empty, and in between.
std::vector<std::int64_t> UnequalShards(std::mt19937* random, std::int64_t num_tokens,
                                        const ExchangeConfig& config) {
  const std::int64_t longest = MaxShardTokens(config.max_batch_tokens, config.num_ranks);
  std::vector<std::int64_t> begin = {0};
  for (int rank = 0; rank < config.num_ranks; ++rank) {
    const std::int64_t left = num_tokens - begin.back();
    const std::int64_t others = (config.num_ranks - rank - 1) * longest;
    const std::int64_t least = std::max<std::int64_t>(left - others, 0);
    const std::int64_t most = std::min(left, longest);
    const std::int64_t any = least + static_cast<std::int64_t>((*random)() % (most - least + 1));
    begin.push_back(begin.back() + ((*random)() % 3 == 0 ? most : (*random)() % 2 ? least : any));
  }
  return begin;
}

TEST(SharedBatchTest, GivesThePushedFormsBitsOnEveryDivision) {
  std::mt19937 random(77);
  for (int round = 0; round < 40; ++round) {
    const int ranks = 1 + static_cast<int>(random() % 6);
    const std::int64_t experts = 1 + static_cast<std::int64_t>(random() % 20);
    const std::int64_t hidden = 1 + static_cast<std::int64_t>(random() % 100);
    const std::int64_t max_tokens = 1 + static_cast<std::int64_t>(random() % 60);
    auto cluster = Cluster::Create(TestConfig(ranks, experts, max_tokens, hidden));
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    for (std::uint64_t sequence = 1; sequence <= 9; sequence += 3) {
      const std::int64_t tokens = static_cast<std::int64_t>(random() % (max_tokens + 1));
      const int topk = 1 + static_cast<int>(random() % 16);
      const Batch batch =
          RandomBatch(&random, kBatchTypes[sequence % 3], tokens, hidden, topk, experts);
      const std::vector<std::int64_t> shards = UnequalShards(&random, tokens, (*cluster)->config());
      SCOPED_TRACE(absl::StrCat("ranks ", ranks, " experts ", experts, " hidden ", hidden,
                                " tokens ", tokens, " topk ", topk));
      const int slot = static_cast<int>(sequence / 3 % 2);
      const auto pushed = (*cluster)->Run(slot, sequence, batch);
      ASSERT_TRUE(pushed.ok()) << pushed.status();
      const auto shared = (*cluster)->RunShared(slot, sequence + 1, batch, shards);
      ASSERT_TRUE(shared.ok()) << shared.status();
      ASSERT_EQ(*shared, *pushed);
      const auto followed = (*cluster)->RunShared(slot, sequence + 2, batch, shards, true);
      ASSERT_TRUE(followed.ok()) << followed.status();
      ASSERT_EQ(*followed, *pushed);
    }
  }
}

TEST(SharedBatchTest, ManyBatchesWithTheirOutputInPlaceDoNotDisturbEachOther) {
  std::mt19937 random(78);
  auto cluster = Cluster::Create(TestConfig(4, 8, 64, 300));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  for (std::uint64_t sequence = 1; sequence <= 60; ++sequence) {
    const auto tokens = static_cast<std::int64_t>(random() % 65);
    const Batch batch = RandomBatch(&random, DataType::kFp32, tokens, 300, 4, 8);
    const bool rows_follow = random() % 2 == 0;
    const auto out = (*cluster)->RunShared(static_cast<int>(sequence % 2), sequence, batch,
                                           ShardBegins(tokens, 4), rows_follow);
    ASSERT_TRUE(out.ok()) << out.status();
    ASSERT_EQ(*out, Reference(batch, (*cluster)->config().placement)) << sequence;
  }
}

TEST(SharedBatchTest, RankThatDoesNotBringItsRowsIsNamed) {
  std::mt19937 random(80);
  ExchangeConfig config = TestConfig(2, 4, 8, 8);
  config.peer_timeout = absl::Milliseconds(50);
  auto cluster = Cluster::Create(config);
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  const Batch batch = RandomBatch(&random, DataType::kFp32, 6, 8, 2, 4);
  const CountMatrix counts = ComputeCountMatrix(batch.topk_ids, 6, 2, config.placement);
  ASSERT_GT(counts.at(1, 0), 0);
  const std::vector<std::int64_t> shards = {0, 3, 6};
  DispatchArgs args = ShardArgs(batch, counts, 0, 1, 2, 0);
  args.shared = {shards, batch.x.data(), batch.topk_ids.data(), batch.topk_weights.data(), true};
  const absl::Status status = (*cluster)->rank(0).Dispatch(args);
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("for rank 1"));
}

// One rank of two, whose dispatch is to fail before it waits for anybody.
class SharedBatchRefusalTest : public ::testing::Test {
 protected:
  SharedBatchRefusalTest() {
    std::mt19937 random(79);
    batch_ = RandomBatch(&random, DataType::kFp32, 6, 8, 2, 4);
    counts_ = ComputeCountMatrix(batch_.topk_ids, 6, 2, EvenPlacement(4, 2));
    auto cluster = Cluster::Create(TestConfig(2, 4, 8, 8));
    EXPECT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = *std::move(cluster);
  }

  absl::Status Dispatch() {
    DispatchArgs args = ShardArgs(batch_, counts_, 0, 1, 2, 0);
    args.shared = {shards_, batch_.x.data(), batch_.topk_ids.data(), batch_.topk_weights.data()};
    return cluster_->rank(0).Dispatch(args);
  }

  void ExpectRefused(const std::string& message) {
    const absl::Status status = Dispatch();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }

  std::vector<std::int64_t> shards_ = {0, 3, 6};
  Batch batch_;
  CountMatrix counts_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_F(SharedBatchRefusalTest, AsItIsItIsTaken) {
  const absl::Status status = Dispatch();
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(SharedBatchRefusalTest, AnIdOutOfRangeIsNamedWhosesoeverItIs) {
  batch_.topk_ids[11] = 4;
  ExpectRefused("topk_ids[5][1] 4 is outside [-1, 4)");
  batch_.topk_ids[11] = -2;
  ExpectRefused("topk_ids[5][1] -2 is outside [-1, 4)");
}

TEST_F(SharedBatchRefusalTest, CountsThatDifferFromTheIdsAreNamed) {
  const auto as_it_is = counts_;
  counts_.rows[2] += 1;  // From the peer to this rank.
  ExpectRefused(absl::StrCat("counts has ", counts_.rows[2], " rows from rank 1 to rank 0"));
  counts_ = as_it_is;
  counts_.rows[1] -= 1;  // From this rank to the peer, which will be waited for.
  ExpectRefused(absl::StrCat("counts has ", counts_.rows[1], " rows from rank 0 to rank 1"));
}

TEST_F(SharedBatchRefusalTest, ADivisionThatIsNoneIsNamed) {
  shards_ = {0, 6};
  ExpectRefused("shard_begin has 2 entries, not the 3 of 2 shards");
  shards_ = {0, 4, 3};
  ExpectRefused("shard_begin from 0 to 3 is not ascending");
  shards_ = {1, 3, 6};
  ExpectRefused("shard_begin from 1 to 6 is not ascending");
  shards_ = {0, 3, 9};
  ExpectRefused("shard_begin from 0 to 9 is not ascending from 0 to at most max_batch_tokens 8");
  shards_ = {0, 1, 6};
  ExpectRefused("the shard of rank 1 has 5 tokens, which exceeds 4");
}

TEST_F(SharedBatchRefusalTest, AShardOfAnotherLengthThanItsRanksIsNamed) {
  shards_ = {0, 4, 6};
  counts_ = {};
  counts_.num_ranks = 2;
  counts_.rows.resize(4);
  counts_.rows_per_expert.resize(4);
  const std::span<const std::int32_t> ids = batch_.topk_ids;
  CountShard(ids.first(8), 2, EvenPlacement(4, 2), std::span(counts_.rows).first(2),
             counts_.rows_per_expert);
  CountShard(ids.subspan(8), 2, EvenPlacement(4, 2), std::span(counts_.rows).last(2),
             counts_.rows_per_expert);
  ExpectRefused("num_tokens 3 is not the 4 of this rank's shard in the shared batch");
}

}  // namespace
}  // namespace epserve::runtime
