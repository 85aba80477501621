// What the exchange refuses, and how its waits end when a peer does not come.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "runtime/base/streamed_copy.h"
#include "tests/runtime/alltoallv/exchange_reference.h"

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

void ExpectStatus(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(part));
}

void ExpectInvalid(const absl::Status& status, const std::string& part) {
  ExpectStatus(status, absl::StatusCode::kInvalidArgument, part);
}

// Two ranks, of which the tests drive rank 0; rank 1 does what a test makes it do.
class HostExchangeFaultsTest : public testing::Test {
 protected:
  void SetUp() override { Open(TestConfig(2, 4, 16, 8)); }

  void Open(const ExchangeConfig& config) {
    auto cluster = Cluster::Create(config);
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = *std::move(cluster);
    counts_ = ComputeCountMatrix(batch_.topk_ids, 16, 2, config.placement);
  }

  void OpenWithTimeout(absl::Duration timeout) {
    ExchangeConfig config = TestConfig(2, 4, 16, 8);
    config.peer_timeout = timeout;
    Open(config);
  }

  DispatchArgs Args(int rank) const { return ShardArgs(batch_, counts_, 0, 1, 2, rank); }
  // Dispatch of rank 0 after `spoil` has had its way with the arguments.
  absl::Status Spoilt(const std::function<void(DispatchArgs*)>& spoil) {
    DispatchArgs args = Args(0);
    spoil(&args);
    return cluster_->rank(0).Dispatch(args);
  }

  static Batch MakeBatch() {
    std::mt19937 random(77);
    Batch batch = RandomBatch(&random, DataType::kFp32, 16, 8, 2, 4);
    for (std::size_t i = 0; i < batch.topk_ids.size(); ++i) {
      batch.topk_ids[i] = static_cast<std::int32_t>(i % 4);  // Every token to one rank and back.
    }
    return batch;
  }

  Batch batch_ = MakeBatch();
  CountMatrix counts_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_F(HostExchangeFaultsTest, ArgumentsOutsideTheConfigAreRefusedByName) {
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->slot = 2; }), "slot 2 is outside [0, 2)");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->slot = -1; }), "slot -1");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->sequence = 0; }), "sequence 0 does not exceed 0");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->dtype = DataType::kInt32; }), "dtype int32");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->num_tokens = 9; }),
                "num_tokens 9 is outside [0, 8]");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->num_tokens = -1; }), "num_tokens -1");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->topk = 17; }), "topk 17 is outside [1, 16]");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->topk = 0; }), "topk 0");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->counts = nullptr; }), "counts is null");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->x = nullptr; }), "is null");
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->x = static_cast<const std::byte*>(a->x) + 1; }),
                "x is not aligned");
}

TEST_F(HostExchangeFaultsTest, IdsOutOfRangeAreRefusedByRowAndValue) {
  batch_.topk_ids[5] = 4;
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)), "topk_ids[2][1] 4 is outside [-1, 4)");
  batch_.topk_ids[5] = -2;
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)), "topk_ids[2][1] -2 is outside [-1, 4)");
  batch_.topk_ids[5] = INT32_MIN;
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)), "is outside [-1, 4)");
}

TEST_F(HostExchangeFaultsTest, CountMatrixThatDisagreesWithTheIdsIsRefusedBeforeAnyWrite) {
  for (std::byte& byte : cluster_->rank(1).ReceiveRegion(1, 0)) byte = std::byte{0x5a};
  counts_.rows[1] -= 1;
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)),
                "counts has 3 rows from rank 0 to rank 1, but topk_ids give 4");
  counts_.rows[1] += 2;
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)), "counts has 5 rows");
  for (const std::byte byte : cluster_->rank(1).ReceiveRegion(1, 0)) {
    ASSERT_EQ(byte, std::byte{0x5a});
  }
}

TEST_F(HostExchangeFaultsTest, CountMatrixPastTheHeapIsRefused) {
  counts_.rows[2] = 9;  // Rank 1's rows to rank 0, of which it has 8 tokens at most.
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)), "rows[1][0] 9 is outside [0, 8]");
  counts_.rows.pop_back();
  ExpectInvalid(cluster_->rank(0).Dispatch(Args(0)), "rows has 3 entries");
}

TEST_F(HostExchangeFaultsTest, RanksThatHoldDifferentMatricesFindOut) {
  CountMatrix other = counts_;
  other.rows[2] += 1;  // Rank 0 believes that rank 1 sends one row more than it does.
  std::thread peer([&] {
    DispatchArgs args = Args(1);
    EXPECT_TRUE(cluster_->rank(1).Dispatch(args).ok());
  });
  DispatchArgs args = Args(0);
  args.counts = &other;
  ExpectStatus(cluster_->rank(0).Dispatch(args), absl::StatusCode::kInternal,
               "rank 1 sent batch 1 with 4 rows at 4, topk 2, dtype 0, which is not what rank 0 "
               "expected: batch 1 with 5 rows");
  peer.join();
}

TEST_F(HostExchangeFaultsTest, PeerOfAnotherBatchIsFoundOut) {
  std::thread peer([&] {
    DispatchArgs args = Args(1);
    args.sequence = 2;
    cluster_->rank(1).Abort();  // So that it does not wait; it has pushed nothing either.
    EXPECT_EQ(cluster_->rank(1).Dispatch(args).code(), absl::StatusCode::kAborted);
  });
  peer.join();
  OpenWithTimeout(absl::Seconds(60));
  std::thread ahead([&] {
    DispatchArgs args = Args(1);
    args.sequence = 2;
    ExpectStatus(cluster_->rank(1).Dispatch(args), absl::StatusCode::kAborted, "aborted");
  });
  ExpectStatus(cluster_->rank(0).Dispatch(Args(0)), absl::StatusCode::kInternal,
               "rank 1 sent batch 2");
  cluster_->rank(1).Abort();
  ahead.join();
}

TEST_F(HostExchangeFaultsTest, RepeatedSequenceIsRefused) {
  ASSERT_TRUE(cluster_->Run(0, 5, batch_).ok());
  ExpectInvalid(Spoilt([](DispatchArgs* a) { a->sequence = 5; }),
                "sequence 5 does not exceed 5, the last one of slot 0");
  EXPECT_TRUE(cluster_->Run(0, 6, batch_).ok());
}

TEST_F(HostExchangeFaultsTest, CombineWithoutABatchIsRefused) {
  std::vector<float> out(64);
  ExpectStatus(cluster_->rank(0).Combine(0, out.data()), absl::StatusCode::kFailedPrecondition,
               "slot 0 holds no batch");
  ExpectInvalid(cluster_->rank(0).Combine(7, out.data()), "slot 7 is outside [0, 2)");
  ASSERT_TRUE(cluster_->Run(0, 1, batch_).ok());
  ExpectStatus(cluster_->rank(0).Combine(0, out.data()), absl::StatusCode::kFailedPrecondition,
               "slot 0 holds no batch");
}

TEST_F(HostExchangeFaultsTest, PeerThatSendsNothingTimesOutByNameInDispatch) {
  OpenWithTimeout(absl::Milliseconds(50));
  const auto begin = std::chrono::steady_clock::now();
  const absl::Status status = cluster_->rank(0).Dispatch(Args(0));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(50));
  ExpectStatus(status, absl::StatusCode::kDeadlineExceeded, "dispatch: rank 0 waited ");
  ExpectStatus(status, absl::StatusCode::kDeadlineExceeded,
               " ms for rank 1 (epoch 1, slot 0, batch 1), which exceeds peer_timeout 50 ms");
}

TEST_F(HostExchangeFaultsTest, PeerThatNeverFinishesItsExpertsTimesOutByNameInCombine) {
  OpenWithTimeout(absl::Milliseconds(50));
  // Rank 1 pushes its rows before it waits, so rank 0 need not meet it within the timeout.
  EXPECT_EQ(cluster_->rank(1).Dispatch(Args(1)).code(), absl::StatusCode::kDeadlineExceeded);
  ASSERT_TRUE(cluster_->rank(0).Dispatch(Args(0)).ok());
  std::vector<float> out(64);
  ExpectStatus(cluster_->rank(0).Combine(0, out.data()), absl::StatusCode::kDeadlineExceeded,
               " ms for rank 1 (epoch 1, slot 0, batch 1)");
}

// Rank 0's combine, with four ranks of which `late` never finish their experts and the others have
// finished. Nothing: a rank's dispatch took longer than the timeout.
std::optional<absl::Status> CombineWithout(const std::vector<int>& late, std::int64_t num_tokens,
                                           std::int64_t hidden, absl::Duration timeout) {
  constexpr int kRanks = 4;
  ExchangeConfig config = TestConfig(kRanks, kRanks, num_tokens, hidden);
  config.peer_timeout = timeout;
  auto cluster = Cluster::Create(config);
  if (!cluster.ok()) return cluster.status();
  std::mt19937 random(7);
  Batch batch = RandomBatch(&random, DataType::kFp32, num_tokens, hidden, kRanks, kRanks);
  for (std::size_t i = 0; i < batch.topk_ids.size(); ++i) {
    batch.topk_ids[i] = static_cast<std::int32_t>(i % kRanks);  // Every token to all ranks.
  }
  const CountMatrix counts =
      ComputeCountMatrix(batch.topk_ids, num_tokens, kRanks, config.placement);
  std::vector<std::thread> ranks;
  std::atomic<bool> too_late = false;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.emplace_back([&, rank] {
      const DispatchArgs args = ShardArgs(batch, counts, 0, 1, kRanks, rank);
      const absl::Status status = (*cluster)->rank(rank).Dispatch(args);
      if (absl::IsDeadlineExceeded(status)) too_late = true;
      EXPECT_TRUE(status.ok() || too_late) << status;
    });
  }
  for (std::thread& rank : ranks) rank.join();
  if (too_late) return std::nullopt;
  std::vector<std::thread> peers;
  for (int rank = 1; rank < kRanks; ++rank) {
    if (std::ranges::count(late, rank) > 0) continue;
    peers.emplace_back([&, rank] {
      std::vector<float> out(static_cast<std::size_t>(num_tokens * hidden));
      // Says that its own are finished, and waits in vain for the late ones, too.
      EXPECT_EQ((*cluster)->rank(rank).Combine(0, out.data()).code(),
                absl::StatusCode::kDeadlineExceeded);
    });
  }
  for (std::thread& peer : peers) peer.join();
  std::vector<float> out(static_cast<std::size_t>(num_tokens * hidden));
  return (*cluster)->rank(0).Combine(0, out.data());
}

void ExpectCombineNames(const std::vector<int>& late, std::int64_t num_tokens, std::int64_t hidden,
                        const std::string& names, const std::string& end) {
  // On a busy machine the dispatches may take longer than a short timeout.
  std::optional<absl::Status> status;
  absl::Duration timeout = absl::Milliseconds(500);
  for (; timeout < absl::Minutes(1); timeout *= 2) {
    status = CombineWithout(late, num_tokens, hidden, timeout);
    if (status.has_value()) break;
  }
  ASSERT_TRUE(status.has_value()) << "no dispatch came in time";
  ExpectStatus(*status, absl::StatusCode::kDeadlineExceeded,
               absl::StrCat(" ms for ", names, " (epoch 1, slot 0, batch 1), which exceeds ",
                            "peer_timeout ", absl::ToInt64Milliseconds(timeout), " ms; ", end));
}

TEST(HostExchangeLateTest, CombineNamesAllRanksThatHaveNotFinishedAndNoOther) {
  // Few rows, of which the lowest rank's are waited for first, and so many that they are streamed.
  constexpr std::int64_t kHidden = 1024;
  constexpr std::int64_t kStreamed = 2048;
  ASSERT_EQ(CopyKindFor(std::uint64_t{kStreamed / 4 * kHidden * sizeof(float)}),
            CopyKind::kStreamed);
  for (const std::int64_t num_tokens : {std::int64_t{16}, kStreamed}) {
    ExpectCombineNames({1, 3}, num_tokens, kHidden, "ranks 1, 3",
                       "those workers are gone or stuck");
    ExpectCombineNames({2}, num_tokens, kHidden, "rank 2", "that worker is gone or stuck");
  }
}

TEST_F(HostExchangeFaultsTest, AbortEndsAWaitLongBeforeItsTimeoutAndAllLaterOnes) {
  absl::Status status;
  const auto begin = std::chrono::steady_clock::now();
  std::thread waiter([&] { status = cluster_->rank(0).Dispatch(Args(0)); });
  // Rank 0 raises its flag at rank 1 before it waits: when rank 1 has its rows, rank 0 waits.
  DispatchArgs peer_args = Args(1);
  CountMatrix one_way = counts_;
  one_way.rows[2] = 0;  // Rank 1 itself sends nothing.
  one_way.rows[3] = 0;
  peer_args.counts = &one_way;
  peer_args.num_tokens = 0;
  EXPECT_TRUE(cluster_->rank(1).Dispatch(peer_args).ok());
  cluster_->rank(0).Abort();
  waiter.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
  ExpectStatus(status, absl::StatusCode::kAborted, "dispatch: rank 0 of epoch 1 was aborted");
  ExpectStatus(Spoilt([](DispatchArgs* a) { a->sequence = 2; }), absl::StatusCode::kAborted,
               "was aborted");
}

TEST_F(HostExchangeFaultsTest, AbortBeforeDispatchLetsNoByteReachAPeer) {
  for (std::byte& byte : cluster_->rank(1).ReceiveRegion(1, 0)) byte = std::byte{0x5a};
  cluster_->rank(0).Abort();
  EXPECT_EQ(cluster_->rank(0).Dispatch(Args(0)).code(), absl::StatusCode::kAborted);
  for (const std::byte byte : cluster_->rank(1).ReceiveRegion(1, 0)) {
    ASSERT_EQ(byte, std::byte{0x5a});
  }
}

TEST(HostExchangeOpenTest, DispatchBeforeOpenPeersIsRefused) {
  auto exchange = HostExchange::Create(TestConfig(1, 4, 16, 8));
  ASSERT_TRUE(exchange.ok());
  ExpectStatus((*exchange)->Dispatch({}), absl::StatusCode::kFailedPrecondition,
               "peers are not open");
}

TEST(HostExchangeOpenTest, HandlesOfOtherRanksEpochsOrShapesAreRefused) {
  ExchangeConfig config = TestConfig(2, 4, 16, 8);
  auto rank0 = HostExchange::Create(config);
  config.rank = 1;
  auto rank1 = HostExchange::Create(config);
  config.epoch = 2;
  auto other_epoch = HostExchange::Create(config);
  config.epoch = 1;
  config.hidden = 800;
  auto other_shape = HostExchange::Create(config);
  config.hidden = 8;
  config.placement.first_expert[1] = 1;  // Bytes are the same, the placement is not.
  auto other_placement = HostExchange::Create(config);
  ASSERT_TRUE(rank0.ok() && rank1.ok() && other_epoch.ok() && other_shape.ok() &&
              other_placement.ok());
  HostExchange& own = **rank0;
  const auto open = [&](std::vector<std::string> handles) { return own.OpenPeers(handles); };
  const std::string good = (*rank1)->handle();
  ExpectInvalid(open({own.handle()}), "1 handles are not one for each of the 2 ranks");
  ExpectInvalid(open({good, own.handle()}), "handle 0 is not the one of this rank's own heap");
  ExpectInvalid(open({own.handle(), own.handle()}), "rank 0 opening rank 1: heap handle: rank 0");
  ExpectInvalid(open({own.handle(), (*other_epoch)->handle()}), "epoch 2 is not the expected 1");
  ExpectInvalid(open({own.handle(), (*other_shape)->handle()}), "bytes");
  ExpectInvalid(open({own.handle(), (*other_placement)->handle()}), "layout_digest");
  ExpectInvalid(open({own.handle(), "garbage"}), "size 7");
  ASSERT_TRUE(open({own.handle(), good}).ok());  // A refusal leaves it as it was.
  ExpectStatus(open({own.handle(), good}), absl::StatusCode::kFailedPrecondition, "they are open");
}

TEST(HostExchangeConfigTest, FieldsOutsideTheirRangeAreRefusedByName) {
  const auto refused = [](const std::function<void(ExchangeConfig*)>& spoil,
                          const std::string& part) {
    ExchangeConfig config = TestConfig(2, 4, 16, 8);
    spoil(&config);
    ExpectInvalid(HostExchange::Create(config).status(), part);
  };
  refused([](ExchangeConfig* c) { c->cluster_id = "a b"; }, "cluster_id");
  refused([](ExchangeConfig* c) { c->epoch = 0; }, "epoch 0");
  refused([](ExchangeConfig* c) { c->num_ranks = 65; }, "num_ranks 65 is outside [1, 64]");
  refused([](ExchangeConfig* c) { c->rank = 2; }, "rank 2 is outside [0, 1]");
  refused([](ExchangeConfig* c) { c->max_batch_tokens = 0; }, "max_batch_tokens 0");
  refused([](ExchangeConfig* c) { c->hidden = 0; }, "hidden 0");
  refused([](ExchangeConfig* c) { c->max_topk = 17; }, "max_topk 17 is outside [1, 16]");
  refused([](ExchangeConfig* c) { c->num_slots = 0; }, "num_slots 0");
  refused([](ExchangeConfig* c) { c->placement.first_expert.pop_back(); }, "placement of 2");
  refused([](ExchangeConfig* c) { c->placement.first_expert = {0, 5, 4}; }, "not ascending");
  refused([](ExchangeConfig* c) { c->placement.first_expert = {0, 0, 0}; }, "num_experts 0");
  refused([](ExchangeConfig* c) { c->peer_timeout = absl::ZeroDuration(); }, "peer_timeout 0 ms");
  refused([](ExchangeConfig* c) { c->peer_timeout = absl::InfiniteDuration(); }, "peer_timeout");
}

}  // namespace
}  // namespace epserve::runtime
