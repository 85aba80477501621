// Several ranks of a device exchange as threads of one process, on as many GPUs as there are (one
// is enough, but for what needs a peer over NCCL, which takes one rank a GPU). Outputs are poisoned
// first, inputs are fresh each time. Compiled for the one-sided kernels and, with
// EPSERVE_TEST_NCCL, for NCCL.
#ifndef EPSERVE_TESTS_GPU_EXCHANGE_FIXTURE_H_
#define EPSERVE_TESTS_GPU_EXCHANGE_FIXTURE_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "runtime/alltoallv/cuda_exchange.h"
#include "runtime/base/dtype.h"
#include "tests/gpu/exchange_case.h"
#ifdef EPSERVE_TEST_NCCL
#include "runtime/alltoallv/nccl_exchange.h"
#endif

namespace epserve::runtime {

using Path = DeviceExchange::Path;

#ifdef EPSERVE_TEST_NCCL
inline constexpr int kRanksPerDevice = 1;  // NCCL refuses a second one.

inline absl::StatusOr<std::unique_ptr<DeviceExchange>> CreateExchange(
    const CudaExchangeConfig& cuda) {
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
inline constexpr int kRanksPerDevice = 4;

inline absl::StatusOr<std::unique_ptr<DeviceExchange>> CreateExchange(
    const CudaExchangeConfig& config) {
  return CudaExchange::Create(config);
}
#endif

inline constexpr absl::Duration kOpenTimeout = absl::Seconds(30);

// Exchanges of ranks 0, 1, ..., each on its device, opened all at once.
inline std::vector<std::unique_ptr<DeviceExchange>> OpenAll(
    const std::vector<CudaExchangeConfig>& configs, int num_devices) {
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
    for (const auto& tokens : {c.tokens, c.later_tokens}) {
      for (const std::int64_t t : tokens) {
        config.base.max_batch_tokens = std::max(config.base.max_batch_tokens, t * c.num_ranks);
      }
    }
    config.base.hidden = c.hidden;
    config.base.max_topk = c.topk;
    config.base.placement = EvenPlacement(c.experts, c.num_ranks);
    config.base.peer_timeout = absl::Seconds(10);
    config.max_decode_tokens = c.decode_tokens;
    config.max_element_bytes = 4;
    config.comm_blocks = c.comm_blocks;
    config.push_blocks = c.push_blocks > 0 ? c.push_blocks : c.comm_blocks;
    config.line_tokens = c.line_tokens;
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

  // What the device has counted is what the matrix says.
  static void ExpectCounted(const CudaExchangeConfig& config, const CountMatrix& counts,
                            const std::int32_t* offset) {
    ASSERT_NE(offset, nullptr);
    const Placement& placement = config.base.placement;
    const std::int64_t first = placement.first_expert[config.base.rank];
    for (std::int64_t e = 0; e < placement.num_local_experts(config.base.rank); ++e) {
      EXPECT_EQ(offset[e + 1] - offset[e], counts.rows_per_expert[first + e]) << "expert " << e;
    }
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
  // bytes. With as many of the ranks as there is place for; where none would have a peer that is to
  // have one, the test is skipped.
  std::vector<std::vector<std::byte>> Run(Case c, int rounds, unsigned seed) {
    const int places = kRanksPerDevice * num_devices_;
    if (c.num_ranks > 1 && places == 1) {
      [] { GTEST_SKIP() << "ranks that exchange rows need a GPU each over NCCL"; }();
      return {};
    }
    c.num_ranks = std::min(c.num_ranks, places);
    c.tokens.resize(c.num_ranks);
    static std::atomic<std::uint64_t> epoch{1};
    const std::uint64_t this_epoch = epoch++;
    std::vector<std::vector<HostTokens>> tokens(rounds);
    std::mt19937 rng(seed);
    for (int round = 0; round < rounds; ++round) {
      for (int r = 0; r < c.num_ranks; ++r) {
        tokens[round].push_back(MakeTokens(c, c.TokensIn(round, r), &rng));
      }
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
    std::int64_t most_tokens = 0;
    for (std::size_t round = 0; round < rounds.size(); ++round) {
      const std::int64_t num_tokens = c.TokensIn(static_cast<int>(round), rank);
      most_tokens = std::max(most_tokens, num_tokens);
      buffers[round].Fill(c, rounds[round][rank], num_tokens);
    }
    auto pinned = PinnedBuffer::Create(
        std::max(expert_bytes, most_tokens * c.hidden * static_cast<std::size_t>(element)) +
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
      const bool late = rank + 1 == c.num_ranks && c.late > absl::ZeroDuration();
      if (late && round == 0) absl::SleepFor(c.late);
      const bool uncounted = c.uncounted && round / 2 % 2 == 0;
      if (!uncounted && exchange.exchanges_counts() && c.path == Path::kPrefill) {
        const auto told = exchange.ExchangeCounts(slot, round + 1, ShardCountsOf(c, mine),
                                                  2 * config.base.peer_timeout, stream);
        ASSERT_TRUE(told.ok()) << told.status();
        EXPECT_EQ(told->rows, counts.rows);
        EXPECT_EQ(told->rows_per_expert, counts.rows_per_expert);
      }
      ASSERT_TRUE(exchange.Dispatch(c.path, slot, t, uncounted ? nullptr : &counts, stream).ok());
      ASSERT_TRUE(exchange.LayOutExperts(c.path, slot, stream).ok());
      ASSERT_TRUE(exchange.Gather(c.path, slot, t, rows->as<void>(), stream).ok());
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      RunTestExperts(c, config.base.placement.first_expert[rank],
                     config.base.placement.num_local_experts(rank),
                     exchange.expert_offset(c.path, slot), rows->as<void>(),
                     pinned->as<std::byte>(), stream);
      if (late && round == 1) absl::SleepFor(c.late);
      ASSERT_TRUE(exchange.Combine(c.path, slot, t, rows->as<void>(), out.as<void>(), stream).ok());
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      ASSERT_TRUE(exchange.CheckWaits().ok()) << exchange.CheckWaits();
      if (uncounted) ExpectCounted(config, counts, exchange.counted_offset(slot));
      std::vector<std::byte>& result = (*outputs)[round * c.num_ranks + rank];
      result.resize(mine.packed.size());
      if (result.empty()) continue;
      ASSERT_EQ(cudaMemcpyAsync(pinned->as<void>(), out.as<void>(), result.size(),
                                cudaMemcpyDeviceToHost, stream),
                cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      std::memcpy(result.data(), pinned->as<void>(), result.size());
      CheckAgainstReference(c, mine, buffers[round].tokens.num_tokens, result);
    }
    meet->arrive_and_wait();  // Nobody unmaps while a peer may still write.
    cudaStreamDestroy(stream);
  }

  int num_devices_ = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_TESTS_GPU_EXCHANGE_FIXTURE_H_
