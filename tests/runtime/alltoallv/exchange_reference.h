// What the exchange's tests share: random batches, a stand-in for the experts, and a plain
// reference that knows nothing of heaps, offsets or shards. Pure functions.
#ifndef EPSERVE_TESTS_RUNTIME_ALLTOALLV_EXCHANGE_REFERENCE_H_
#define EPSERVE_TESTS_RUNTIME_ALLTOALLV_EXCHANGE_REFERENCE_H_

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "tests/support/many_mappings.h"

namespace epserve::runtime {

struct Batch {
  DataType dtype = DataType::kFp32;
  std::int64_t num_tokens = 0;         // T
  std::int64_t hidden = 0;             // H
  int topk = 0;                        // K
  std::vector<std::byte> x;            // [T, H] dtype
  std::vector<std::int32_t> topk_ids;  // [T, K]
  std::vector<float> topk_weights;     // [T, K]

  std::uint64_t row_bytes() const { return hidden * DataTypeBytes(dtype); }
};

// Ids are drawn from [-1, E) with repetition, so a row holds duplicates and empty places.
inline Batch RandomBatch(std::mt19937* random, DataType dtype, std::int64_t num_tokens,
                         std::int64_t hidden, int topk, std::int64_t num_experts) {
  Batch batch{dtype, num_tokens, hidden, topk};
  std::uniform_real_distribution<float> value(-1.0f, 1.0f);
  std::vector<float> row(hidden);
  batch.x.resize(num_tokens * batch.row_bytes());
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (float& element : row) element = value(*random);
    ConvertFromFloat(dtype, row.data(), batch.x.data() + t * batch.row_bytes(), hidden);
  }
  std::uniform_int_distribution<std::int32_t> id(-1, static_cast<std::int32_t>(num_experts) - 1);
  for (std::int64_t i = 0; i < num_tokens * topk; ++i) {
    batch.topk_ids.push_back(id(*random));
    batch.topk_weights.push_back(value(*random));
  }
  return batch;
}

// The stand-in for expert `expert` at one element: neither linear nor the same for two experts.
inline float StandInExpert(std::int64_t expert, float x) {
  return x * (1.0f + 0.25f * static_cast<float>(expert)) + x * x * static_cast<float>(expert % 3);
}

// Adds weight * expert(x) to `sum` [H], in the type's own fp32 steps.
inline void AddExpert(const std::vector<float>& x, std::int64_t expert, float weight,
                      std::vector<float>* sum) {
  for (std::size_t h = 0; h < x.size(); ++h) (*sum)[h] += weight * StandInExpert(expert, x[h]);
}

// Plays the experts of a rank: fills partial_rows from what has arrived.
inline void RunStandIn(const ReceivedRows& received, std::int64_t hidden,
                       std::int64_t first_expert) {
  std::vector<float> x(hidden);
  std::vector<float> sum(hidden);
  for (std::int64_t n = 0; n < received.num_rows; ++n) {
    ConvertToFloat(received.dtype, received.rows[n], x.data(), hidden);
    sum.assign(hidden, 0.0f);
    for (int k = 0; k < received.topk; ++k) {
      const std::int32_t local = received.local_experts[n * received.topk + k];
      if (local < 0) continue;
      AddExpert(x, first_expert + local, received.weights[n * received.topk + k], &sum);
    }
    ConvertFromFloat(received.dtype, sum.data(),
                     received.partial_rows + n * hidden * DataTypeBytes(received.dtype), hidden);
  }
}

// The whole batch's output [T, H], token by token: per rank the weighted sum over its experts,
// rounded once, then the ranks' sums in ascending order in fp32. Equal to the bit.
inline std::vector<std::byte> Reference(const Batch& batch, const Placement& placement) {
  std::vector<std::byte> out(batch.num_tokens * batch.row_bytes());
  std::vector<float> x(batch.hidden);
  std::vector<std::byte> rounded(batch.row_bytes());
  std::vector<float> widened(batch.hidden);
  for (std::int64_t t = 0; t < batch.num_tokens; ++t) {
    ConvertToFloat(batch.dtype, batch.x.data() + t * batch.row_bytes(), x.data(), batch.hidden);
    std::vector<float> total(batch.hidden, 0.0f);
    bool first = true;
    for (int rank = 0; rank < placement.num_ranks(); ++rank) {
      std::vector<float> sum(batch.hidden, 0.0f);
      bool any = false;
      for (int k = 0; k < batch.topk; ++k) {
        const std::int32_t id = batch.topk_ids[t * batch.topk + k];
        if (id < placement.first_expert[rank] || id >= placement.first_expert[rank + 1]) continue;
        any = true;
        AddExpert(x, id, batch.topk_weights[t * batch.topk + k], &sum);
      }
      if (!any) continue;
      ConvertFromFloat(batch.dtype, sum.data(), rounded.data(), batch.hidden);
      ConvertToFloat(batch.dtype, rounded.data(), widened.data(), batch.hidden);
      for (std::int64_t h = 0; h < batch.hidden; ++h) {
        total[h] = first ? widened[h] : total[h] + widened[h];
      }
      first = false;
    }
    ConvertFromFloat(batch.dtype, total.data(), out.data() + t * batch.row_bytes(), batch.hidden);
  }
  return out;
}

inline ExchangeConfig TestConfig(int num_ranks, std::int64_t num_experts,
                                 std::int64_t max_batch_tokens, std::int64_t hidden) {
  ExchangeConfig config;
  config.cluster_id = absl::StrCat("exchange-test-", ::getpid());
  config.epoch = 1;
  config.num_ranks = num_ranks;
  config.max_batch_tokens = max_batch_tokens;
  config.hidden = hidden;
  config.max_topk = 16;
  config.placement = EvenPlacement(num_experts, num_ranks);
  config.peer_timeout = absl::Seconds(60);
  return config;
}

inline DispatchArgs ShardArgs(const Batch& batch, const CountMatrix& counts, int slot,
                              std::uint64_t sequence, int num_ranks, int rank) {
  const RowRange shard = ShardOf(batch.num_tokens, num_ranks, rank);
  DispatchArgs args;
  args.slot = slot;
  args.sequence = sequence;
  args.dtype = batch.dtype;
  args.x = batch.x.data() + shard.begin * batch.row_bytes();
  args.topk_ids = batch.topk_ids.data() + shard.begin * batch.topk;
  args.topk_weights = batch.topk_weights.data() + shard.begin * batch.topk;
  args.num_tokens = shard.size();
  args.topk = batch.topk;
  args.counts = &counts;
  return args;
}

// The begins of `shards`' ranges and the end of the last, as SharedBatch has them.
inline std::vector<std::int64_t> ShardBegins(std::int64_t num_tokens, int num_ranks) {
  std::vector<std::int64_t> begin;
  for (int rank = 0; rank < num_ranks; ++rank) {
    begin.push_back(ShardOf(num_tokens, num_ranks, rank).begin);
  }
  begin.push_back(num_tokens);
  return begin;
}

// What one rank counts of its shard.
inline ShardCounts CountsOf(const Batch& batch, const Placement& placement, int rank) {
  ShardCounts counts;
  counts.rows_to_rank.resize(static_cast<std::size_t>(placement.num_ranks()));
  counts.rows_per_expert.resize(static_cast<std::size_t>(placement.num_experts()));
  const RowRange shard = ShardOf(batch.num_tokens, placement.num_ranks(), rank);
  CountShard(std::span(batch.topk_ids)
                 .subspan(static_cast<std::size_t>(shard.begin * batch.topk),
                          static_cast<std::size_t>(shard.size() * batch.topk)),
             batch.topk, placement, counts.rows_to_rank, counts.rows_per_expert);
  return counts;
}

// All ranks of an epoch in one process, each with its own heap and its own mappings of the others'.
class Cluster {
 public:
  static absl::StatusOr<std::unique_ptr<Cluster>> Create(ExchangeConfig config) {
    auto cluster = std::make_unique<Cluster>();
    cluster->config_ = config;
    std::vector<std::string> handles;
    for (config.rank = 0; config.rank < config.num_ranks; ++config.rank) {
      auto rank = HostExchange::Create(config);
      if (!rank.ok()) return rank.status();
      handles.push_back((*rank)->handle());
      cluster->ranks_.push_back(*std::move(rank));
    }
    for (auto& rank : cluster->ranks_) {
      const absl::Status opened = rank->OpenPeers(handles);
      if (!opened.ok()) return opened;
    }
    for (auto& rank : cluster->ranks_) rank->Seal();
    return cluster;
  }

  const ExchangeConfig& config() const { return config_; }
  HostExchange& rank(int rank) { return *ranks_[rank]; }

  // Runs the batch as one that all ranks see, cut at `shard_begin`, with a thread a rank. Its
  // output takes the place of its rows, which each rank brings there itself if they follow.
  absl::StatusOr<std::vector<std::byte>> RunShared(int slot, std::uint64_t sequence,
                                                   const Batch& batch,
                                                   const std::vector<std::int64_t>& shard_begin,
                                                   bool rows_follow = false) {
    const int num_ranks = config_.num_ranks;
    CountMatrix counts;
    counts.num_ranks = num_ranks;
    counts.rows.resize(static_cast<std::size_t>(num_ranks * num_ranks));
    counts.rows_per_expert.resize(static_cast<std::size_t>(config_.placement.num_experts()));
    for (int rank = 0; rank < num_ranks; ++rank) {
      CountShard(std::span(batch.topk_ids)
                     .subspan(static_cast<std::size_t>(shard_begin[rank] * batch.topk),
                              static_cast<std::size_t>((shard_begin[rank + 1] - shard_begin[rank]) *
                                                       batch.topk)),
                 batch.topk, config_.placement,
                 std::span(counts.rows)
                     .subspan(static_cast<std::size_t>(rank * num_ranks),
                              static_cast<std::size_t>(num_ranks)),
                 counts.rows_per_expert);
    }
    const std::vector<std::byte> poison(batch.x.size(), std::byte{0xff});
    const ManyMappings rows(rows_follow ? poison : batch.x, num_ranks);
    std::vector<absl::Status> results(num_ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_ranks; ++rank) {
      threads.emplace_back([&, rank] {
        HostExchange& exchange = *ranks_[rank];
        DispatchArgs args = ShardArgs(batch, counts, slot, sequence, num_ranks, rank);
        args.x = nullptr;  // The shared batch's stand in their place.
        args.topk_ids = nullptr;
        args.topk_weights = nullptr;
        args.num_tokens = shard_begin[rank + 1] - shard_begin[rank];
        args.shared = {shard_begin, rows.view(rank), batch.topk_ids.data(),
                       batch.topk_weights.data(), rows_follow};
        if (rows_follow) {
          const std::int64_t begin = shard_begin[rank] * batch.row_bytes();
          std::copy_n(batch.x.begin() + begin, args.num_tokens * batch.row_bytes(),
                      rows.view(rank) + begin);
        }
        results[rank] = exchange.Dispatch(args);
        if (!results[rank].ok()) return;
        RunStandIn(exchange.Received(slot), batch.hidden, config_.placement.first_expert[rank]);
        results[rank] =
            exchange.Combine(slot, rows.view(rank) + shard_begin[rank] * batch.row_bytes());
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const absl::Status& result : results) {
      if (!result.ok()) return result;
    }
    return std::vector<std::byte>(rows.view(0), rows.view(0) + batch.x.size());
  }

  // Runs the batch with a thread a rank, memory poisoned first. The output, or the first error.
  absl::StatusOr<std::vector<std::byte>> Run(int slot, std::uint64_t sequence, const Batch& batch) {
    const int num_ranks = config_.num_ranks;
    const CountMatrix counts =
        ComputeCountMatrix(batch.topk_ids, batch.num_tokens, batch.topk, config_.placement);
    std::vector<std::byte> out(batch.x.size(), std::byte{0xa5});
    std::vector<absl::Status> results(num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (std::byte& byte : ranks_[rank]->ReceiveRegion(rank, slot)) byte = std::byte{0xff};
    }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_ranks; ++rank) {
      threads.emplace_back([&, rank] {
        HostExchange& exchange = *ranks_[rank];
        results[rank] =
            exchange.Dispatch(ShardArgs(batch, counts, slot, sequence, num_ranks, rank));
        if (!results[rank].ok()) return;
        RunStandIn(exchange.Received(slot), batch.hidden, config_.placement.first_expert[rank]);
        const std::int64_t begin = ShardOf(batch.num_tokens, num_ranks, rank).begin;
        results[rank] = exchange.Combine(slot, out.data() + begin * batch.row_bytes());
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const absl::Status& result : results) {
      if (!result.ok()) return result;
    }
    return out;
  }

 private:
  ExchangeConfig config_;
  std::vector<std::unique_ptr<HostExchange>> ranks_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_TESTS_RUNTIME_ALLTOALLV_EXCHANGE_REFERENCE_H_
