// The device exchanges against a plain CPU reference: several ranks as threads of one process, on
// as many GPUs as there are (one is enough, but for what needs a peer over NCCL, which takes one
// rank a GPU). Outputs are poisoned first, inputs are fresh each time. Compiled for the one-sided
// kernels and, with EPSERVE_TEST_NCCL, for NCCL.
#include "runtime/alltoallv/cuda_exchange.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/dtype.h"
#include "tests/gpu/exchange_case.h"
#ifdef EPSERVE_TEST_NCCL
#include "runtime/alltoallv/nccl_exchange.h"
#endif

namespace epserve::runtime {
namespace {

using Path = DeviceExchange::Path;

#ifdef EPSERVE_TEST_NCCL
constexpr int kRanksPerDevice = 1;  // NCCL refuses a second one.

absl::StatusOr<std::unique_ptr<DeviceExchange>> CreateExchange(const CudaExchangeConfig& cuda) {
  NcclExchangeConfig config;
  config.base = cuda.base;
  config.max_decode_tokens = cuda.max_decode_tokens;
  config.max_element_bytes = cuda.max_element_bytes;
  config.comm_blocks = cuda.comm_blocks;
  return NcclExchange::Create(config);
}
#else
// With eight ranks in one context one rank's launches were seen to wait for the others' kernels,
// which wait for it. The product has one rank a device and process.
constexpr int kRanksPerDevice = 4;

absl::StatusOr<std::unique_ptr<DeviceExchange>> CreateExchange(const CudaExchangeConfig& config) {
  return CudaExchange::Create(config);
}
#endif

constexpr absl::Duration kOpenTimeout = absl::Seconds(30);

// Exchanges of ranks 0, 1, ..., each on its device, opened all at once.
std::vector<std::unique_ptr<DeviceExchange>> OpenAll(const std::vector<CudaExchangeConfig>& configs,
                                                     int num_devices) {
  const std::size_t num_ranks = configs.size();
  std::vector<std::unique_ptr<DeviceExchange>> ranks(num_ranks);
  std::vector<std::string> handles(num_ranks);
  std::barrier meet(static_cast<std::ptrdiff_t>(num_ranks));
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] {
      EXPECT_EQ(cudaSetDevice(static_cast<int>(r) % num_devices), cudaSuccess);
      auto created = CreateExchange(configs[r]);
      EXPECT_TRUE(created.ok()) << created.status();
      if (created.ok()) {
        ranks[r] = std::move(created).value();
        handles[r] = ranks[r]->handle();
      }
      meet.arrive_and_wait();
      if (ranks[r] == nullptr) return;
      const absl::Status opened = ranks[r]->OpenPeers(handles, kOpenTimeout);
      EXPECT_TRUE(opened.ok()) << opened;
    });
  }
  for (std::thread& t : threads) t.join();
  return ranks;
}

class CudaExchangeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    // With fewer hardware queues than streams, one rank's waiting kernel may stand before
    // another's.
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    if (cudaGetDeviceCount(&num_devices_) != cudaSuccess || num_devices_ == 0) {
      GTEST_SKIP() << "a device backend needs a GPU, and this machine has none";
    }
#ifdef EPSERVE_TEST_NCCL
    // Not asked of the backend under test: that it can be opened is a part of what is tested.
    if (!LoadNcclApi().ok()) GTEST_SKIP() << LoadNcclApi().status();
#endif
  }

  // True where there is no place for so many ranks that each has a peer.
  bool NoPlaceFor(int num_ranks) const { return num_ranks > kRanksPerDevice * num_devices_; }

  CudaExchangeConfig Config(const Case& c, int rank, std::uint64_t epoch) const {
    CudaExchangeConfig config;
    config.base.cluster_id = absl::StrCat("gputest-", getpid());
    config.base.epoch = epoch;
    config.base.rank = rank;
    config.base.num_ranks = c.num_ranks;
    config.base.max_batch_tokens = 0;
    for (const std::int64_t t : c.tokens) {
      config.base.max_batch_tokens = std::max(config.base.max_batch_tokens, t * c.num_ranks);
    }
    config.base.hidden = c.hidden;
    config.base.max_topk = c.topk;
    config.base.placement = EvenPlacement(c.experts, c.num_ranks);
    config.base.peer_timeout = absl::Seconds(10);
    config.max_decode_tokens = 256;
    config.max_element_bytes = 4;
    config.comm_blocks = c.comm_blocks;
    // All ranks' blocks that wait must fit the device beside one that does not: several ranks
    // may share it.
    config.reduce_blocks = c.reduce_blocks;
    config.decode_blocks = 8;
    config.decode_combine_blocks = 12;
    return config;
  }

  // The matrix of shards that need not be ShardOf's.
  static CountMatrix Counts(const Case& c, const std::vector<HostTokens>& tokens) {
    const Placement placement = EvenPlacement(c.experts, c.num_ranks);
    CountMatrix counts;
    counts.num_ranks = c.num_ranks;
    counts.rows.assign(c.num_ranks * c.num_ranks, 0);
    counts.rows_per_expert.assign(c.experts, 0);
    for (int r = 0; r < c.num_ranks; ++r) {
      CountShard(tokens[r].ids, c.topk, placement,
                 std::span(counts.rows).subspan(r * c.num_ranks, c.num_ranks),
                 counts.rows_per_expert);
    }
    return counts;
  }

  static ShardCounts ShardCountsOf(const Case& c, const HostTokens& tokens) {
    ShardCounts counts;
    counts.rows_to_rank.resize(c.num_ranks);
    counts.rows_per_expert.resize(c.experts);
    CountShard(tokens.ids, c.topk, EvenPlacement(c.experts, c.num_ranks), counts.rows_to_rank,
               counts.rows_per_expert);
    return counts;
  }

  // Runs `rounds` batches on every rank, checks each against the reference, returns all output
  // bytes.
  std::vector<std::vector<std::byte>> Run(Case c, int rounds, unsigned seed) {
    c.num_ranks = std::min(c.num_ranks, kRanksPerDevice * num_devices_);
    c.tokens.resize(c.num_ranks);
    static std::atomic<std::uint64_t> epoch{1};
    const std::uint64_t this_epoch = epoch++;
    std::vector<std::vector<HostTokens>> tokens(rounds);
    std::mt19937 rng(seed);
    for (auto& round : tokens) {
      for (int r = 0; r < c.num_ranks; ++r) round.push_back(MakeTokens(c, c.tokens[r], &rng));
    }
    std::vector<std::vector<std::byte>> outputs(c.num_ranks * rounds);
    std::vector<std::thread> threads;
    std::barrier meet(c.num_ranks);
    std::vector<std::string> handles(c.num_ranks);
    for (int rank = 0; rank < c.num_ranks; ++rank) {
      threads.emplace_back([&, rank] {
        ASSERT_EQ(cudaSetDevice(rank % num_devices_), cudaSuccess);
        RunRank(c, Config(c, rank, this_epoch), tokens, &meet, &handles, &outputs);
      });
    }
    for (std::thread& t : threads) t.join();
    return outputs;
  }

  void RunRank(const Case& c, const CudaExchangeConfig& config,
               const std::vector<std::vector<HostTokens>>& rounds, std::barrier<>* meet,
               std::vector<std::string>* handles, std::vector<std::vector<std::byte>>* outputs) {
    const int rank = config.base.rank;
    auto created = CreateExchange(config);
    ASSERT_TRUE(created.ok()) << created.status();
    DeviceExchange& exchange = **created;
    (*handles)[rank] = exchange.handle();
    meet->arrive_and_wait();
    const absl::Status opened = exchange.OpenPeers(*handles, kOpenTimeout);
    ASSERT_TRUE(opened.ok()) << opened;
    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    const std::int64_t element = DataTypeBytes(c.dtype);
    const std::size_t expert_bytes = exchange.row_capacity(c.path) * c.topk * c.hidden * element;
    auto rows = DeviceBuffer::Create(expert_bytes);
    ASSERT_TRUE(rows.ok()) << rows.status();
    // Allocating waits for the whole device, and ranks that share one wait for each other: so all
    // memory first, then the meeting, then the batches.
    std::vector<RoundBuffers> buffers(rounds.size());
    for (std::size_t round = 0; round < rounds.size(); ++round) {
      buffers[round].Fill(c, rounds[round][rank], c.tokens[rank]);
    }
    auto pinned = PinnedBuffer::Create(
        std::max(expert_bytes, c.tokens[rank] * c.hidden * static_cast<std::size_t>(element)) +
        4 * static_cast<std::size_t>(c.experts + 1));
    ASSERT_TRUE(pinned.ok()) << pinned.status();
    // A stream's first copy each way waits for the whole device too.
    for (const std::size_t bytes : {std::size_t{64}, expert_bytes}) {
      ASSERT_EQ(cudaMemcpyAsync(pinned->as<void>(), rows->as<void>(), bytes, cudaMemcpyDeviceToHost,
                                stream),
                cudaSuccess);
      ASSERT_EQ(cudaMemcpyAsync(rows->as<void>(), pinned->as<void>(), bytes, cudaMemcpyHostToDevice,
                                stream),
                cudaSuccess);
    }
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    meet->arrive_and_wait();
    for (std::size_t round = 0; round < rounds.size(); ++round) {
      const HostTokens& mine = rounds[round][rank];
      const CudaTokens& t = buffers[round].tokens;
      const DeviceBuffer& out = buffers[round].out;
      const int slot = static_cast<int>(round) % 2;
      const CountMatrix counts = Counts(c, rounds[round]);
      if (exchange.exchanges_counts() && c.path == Path::kPrefill) {
        const auto told = exchange.ExchangeCounts(slot, round + 1, ShardCountsOf(c, mine),
                                                  2 * config.base.peer_timeout, stream);
        ASSERT_TRUE(told.ok()) << told.status();
        EXPECT_EQ(told->rows, counts.rows);
        EXPECT_EQ(told->rows_per_expert, counts.rows_per_expert);
      }
      ASSERT_TRUE(exchange.Dispatch(c.path, slot, t, &counts, stream).ok());
      ASSERT_TRUE(exchange.LayOutExperts(c.path, slot, stream).ok());
      ASSERT_TRUE(exchange.Gather(c.path, slot, t, rows->as<void>(), stream).ok());
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      RunTestExperts(c, config.base.placement.first_expert[rank],
                     config.base.placement.num_local_experts(rank),
                     exchange.expert_offset(c.path, slot), rows->as<void>(),
                     pinned->as<std::byte>(), stream);
      ASSERT_TRUE(exchange.Combine(c.path, slot, t, rows->as<void>(), out.as<void>(), stream).ok());
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      ASSERT_TRUE(exchange.CheckWaits().ok()) << exchange.CheckWaits();
      std::vector<std::byte>& result = (*outputs)[round * c.num_ranks + rank];
      result.resize(mine.packed.size());
      if (result.empty()) continue;
      ASSERT_EQ(cudaMemcpyAsync(pinned->as<void>(), out.as<void>(), result.size(),
                                cudaMemcpyDeviceToHost, stream),
                cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      std::memcpy(result.data(), pinned->as<void>(), result.size());
      CheckAgainstReference(c, mine, c.tokens[rank], result);
    }
    meet->arrive_and_wait();  // Nobody unmaps while a peer may still write.
    cudaStreamDestroy(stream);
  }

  int num_devices_ = 0;
};

TEST_F(CudaExchangeTest, PrefillBf16MatchesReference) { Run({}, 5, 1); }

TEST_F(CudaExchangeTest, PrefillFp32MatchesReference) {
  Case c;
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  c.hidden = 68;  // Rows shorter than a warp's reach.
  Run(c, 3, 2);
}

TEST_F(CudaExchangeTest, PrefillFp16OddTopkMatchesReference) {
  Case c;
  c.dtype = DataType::kFp16;
  c.topk = 3;
  Run(c, 3, 3);
}

TEST_F(CudaExchangeTest, PrefillManyTokensAWarpEachMatchesReference) {
  Case c;
  c.tokens = {1500, 700, 1, 1100};
  c.comm_blocks = 3;
  Run(c, 3, 4);
}

TEST_F(CudaExchangeTest, PrefillFp8MatchesReferenceWithinItsPrecision) {
  Case c;
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 3, 5);
  c.tokens = {900, 300, 2, 1000};
  Run(c, 2, 6);
}

TEST_F(CudaExchangeTest, DecodeMatchesReferenceOverManyReplays) {
  Case c;
  c.path = Path::kDecode;
  c.tokens = {128, 1, 0, 77};
  Run(c, 7, 7);
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 4, 8);
}

TEST_F(CudaExchangeTest, PrefillFp8OddGroupsOverManyRowsMatchesReference) {
  Case c;
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  c.tokens = {900, 300, 2, 1000};
  for (const std::int64_t hidden : {128, 384, 4224}) {  // 1, 3 and 33 groups: parts of a line
    c.hidden = hidden;
    Run(c, 1, 14);
  }
}

TEST_F(CudaExchangeTest, Fp8GroupsOfZerosAndOfTinyValuesStayFinite) {
  Case c;
  c.payload = RowPayload::kFp8;
  c.odd_groups = true;
  c.limit = 4e-2;
  c.tokens = {900, 3, 0, 64};
  Run(c, 1, 18);
  c.path = Path::kDecode;
  c.tokens = {128, 3, 0, 64};
  Run(c, 1, 19);
}

TEST_F(CudaExchangeTest, PrefillRowsOfManyLengthsMatchReference) {
  Case c;
  for (const std::int64_t hidden : {8, 256, 1032, 7168}) {  // below, at and past a warp's piece
    c.hidden = hidden;
    Run(c, 2, 15);
  }
}

TEST_F(CudaExchangeTest, PrefillRowsOfUnequalPiecesMatchReference) {
  Case c;
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  for (const std::int64_t hidden : {1796, 5380}) {  // 449 vectors: two pieces; 1345: four
    c.hidden = hidden;
    Run(c, 2, 17);
  }
}

TEST_F(CudaExchangeTest, PrefillTokensOfOneExpertOrNoneMatchReference) {
  Case c;
  c.topk = 1;
  c.experts = 4;  // A fifth of the tokens has none; of the others some are local, some not.
  c.tokens = {400, 90, 0, 129};
  Run(c, 3, 18);
}

TEST_F(CudaExchangeTest, DecodeWithMoreTokensThanALookMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.tokens = {256, 255, 3, 0};
  c.hidden = 4352;  // Rows longer than a block's first pieces.
  Run(c, 3, 16);
}

TEST_F(CudaExchangeTest, AllTokensOnOneExpertMatchReference) {
  Case c;
  c.one_expert = true;
  Run(c, 2, 9);
}

TEST_F(CudaExchangeTest, OneRankMatchesReference) {
  Case c;
  c.num_ranks = 1;
  c.tokens = {50};
  Run(c, 2, 10);
}

TEST_F(CudaExchangeTest, EightRanksTopkSixteenMatchReference) {
  Case c;
  c.num_ranks = 8;
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "eight ranks need more GPUs";
  c.tokens = {40, 3, 0, 9, 100, 1, 64, 31};
  c.topk = 16;
  c.experts = 100;
  Run(c, 3, 11);
}

TEST_F(CudaExchangeTest, SameInputsGiveSameBits) {
  Case c;
  c.tokens = {500, 300, 0, 129};
  EXPECT_EQ(Run(c, 2, 12), Run(c, 2, 12));
}

// Blocks decide who adds what, and whether a block or a team's ring does; never in what order.
TEST_F(CudaExchangeTest, AnyNumberOfBlocksGivesSameBits) {
  for (const std::int64_t hidden : {512, 7168}) {
    Case c;
    c.hidden = hidden;
    c.tokens = {40, 37, 0, 33};
    const auto many_rows_a_block = Run(c, 2, 19);
    c.comm_blocks = 1;
    c.reduce_blocks = 1;
    EXPECT_EQ(Run(c, 2, 19), many_rows_a_block);
    c.comm_blocks = 16;
    c.reduce_blocks = 5;
    EXPECT_EQ(Run(c, 2, 19), many_rows_a_block);  // Eight rows a block or fewer.
  }
}

TEST_F(CudaExchangeTest, SilentPeerTimesOutNamingIt) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "two ranks need two GPUs over NCCL";
  std::mt19937 rng(13);
  std::vector<HostTokens> tokens = {MakeTokens(c, 4, &rng), MakeTokens(c, 4, &rng)};
  std::vector<CudaExchangeConfig> configs = {Config(c, 0, 1000), Config(c, 1, 1000)};
  for (CudaExchangeConfig& config : configs) config.base.peer_timeout = absl::Milliseconds(50);
  const auto ranks = OpenAll(configs, num_devices_);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  RoundBuffers buffers;
  buffers.Fill(c, tokens[0], 4);
  const CountMatrix counts = Counts(c, tokens);
  ASSERT_TRUE(ranks[0]->Dispatch(Path::kPrefill, 0, buffers.tokens, &counts, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const absl::Status status = ranks[0]->CheckWaits();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_NE(status.message().find("dispatch: rank 0"), std::string::npos) << status;
#ifndef EPSERVE_TEST_NCCL  // NCCL does not say which.
  EXPECT_NE(status.message().find("for rank 1"), std::string::npos) << status;
  // What comes behind a wait that gave up has no rows to work on.
  ASSERT_TRUE(ranks[0]->LayOutExperts(Path::kPrefill, 0, nullptr).ok());
  std::vector<std::int32_t> offsets(configs[0].base.placement.num_local_experts(0) + 1, -1);
  ASSERT_EQ(cudaMemcpy(offsets.data(), ranks[0]->expert_offset(Path::kPrefill, 0),
                       offsets.size() * sizeof(offsets[0]), cudaMemcpyDeviceToHost),
            cudaSuccess);
  EXPECT_EQ(offsets, std::vector<std::int32_t>(offsets.size(), 0));
#endif
}

TEST_F(CudaExchangeTest, PeerThatNeverTellsItsCountsTimesOutNamingIt) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "two ranks need two GPUs over NCCL";
  std::mt19937 rng(17);
  const HostTokens tokens = MakeTokens(c, 4, &rng);
  std::vector<CudaExchangeConfig> configs = {Config(c, 0, 1500), Config(c, 1, 1500)};
  for (CudaExchangeConfig& config : configs) config.base.peer_timeout = absl::Milliseconds(50);
  const auto ranks = OpenAll(configs, num_devices_);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  const auto told =
      ranks[0]->ExchangeCounts(0, 1, ShardCountsOf(c, tokens), absl::Seconds(10), nullptr);
  ASSERT_FALSE(told.ok());
  if (!ranks[0]->exchanges_counts()) {
    EXPECT_EQ(told.status().code(), absl::StatusCode::kUnimplemented) << told.status();
    return;
  }
  EXPECT_EQ(told.status().code(), absl::StatusCode::kDeadlineExceeded) << told.status();
  EXPECT_NE(told.status().message().find("counts: rank 0 waited"), std::string::npos)
      << told.status();
  EXPECT_NE(told.status().message().find("for rank 1"), std::string::npos) << told.status();
  // A batch's number is used once in a slot.
  EXPECT_EQ(ranks[0]
                ->ExchangeCounts(0, 1, ShardCountsOf(c, tokens), absl::Seconds(10), nullptr)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(CudaExchangeTest, AbortEndsADeviceWait) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "two ranks need two GPUs over NCCL";
  std::mt19937 rng(14);
  std::vector<HostTokens> tokens = {MakeTokens(c, 4, &rng), MakeTokens(c, 4, &rng)};
  const auto ranks = OpenAll({Config(c, 0, 2000), Config(c, 1, 2000)}, num_devices_);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  RoundBuffers buffers;
  buffers.Fill(c, tokens[0], 4);
  const CountMatrix counts = Counts(c, tokens);
  ASSERT_TRUE(ranks[0]->Dispatch(Path::kPrefill, 0, buffers.tokens, &counts, nullptr).ok());
  ranks[0]->Abort();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(ranks[0]->CheckWaits().code(), absl::StatusCode::kAborted);
}

TEST_F(CudaExchangeTest, MissingPeerEndsOpenPeersInTime) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  std::vector<std::unique_ptr<DeviceExchange>> ranks;
  std::vector<std::string> handles;
  for (int r = 0; r < 2; ++r) {
    auto created = CreateExchange(Config(c, r, 3000));
    ASSERT_TRUE(created.ok()) << created.status();
    handles.push_back((*created)->handle());
    ranks.push_back(std::move(created).value());
  }
  ranks[1].reset();
  const absl::Status status = ranks[0]->OpenPeers(handles, absl::Milliseconds(500));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
}

TEST_F(CudaExchangeTest, HandleOfAnotherEpochIsRefused) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  auto own = CreateExchange(Config(c, 0, 4000));
  auto other = CreateExchange(Config(c, 1, 4001));
  ASSERT_TRUE(own.ok() && other.ok());
  const std::vector<std::string> handles = {(*own)->handle(), (*other)->handle()};
  const absl::Status status = (*own)->OpenPeers(handles, absl::Milliseconds(500));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(status.message().find("epoch"), std::string::npos) << status;
}

}  // namespace
}  // namespace epserve::runtime
