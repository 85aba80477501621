// R engines of the tested backend in threads of one process, driven as workers drive theirs: shards
// staged, counts gathered, batches run to the end.
#ifndef EPSERVE_TESTS_RUNTIME_ENGINE_ENGINE_CLUSTER_H_
#define EPSERVE_TESTS_RUNTIME_ENGINE_ENGINE_CLUSTER_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <barrier>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/engine/engine.h"
#include "tests/runtime/engine/engine_backend.h"
#include "tests/support/many_mappings.h"

namespace epserve::testing {

struct Batch {
  int slot = 0;
  std::uint64_t sequence = 1;
  std::int64_t layer = 0;
  runtime::DataType dtype = runtime::DataType::kFp32;
  std::int64_t num_tokens = 0;
  int topk = 0;
  std::vector<std::byte> hidden;  // [T, H]
  std::vector<std::int32_t> ids;  // [T, K], empty: the router decides
  std::vector<float> weights;     // [T, K]
  // Empty, or [R + 1]: all ranks see the batch, cut so, and its output takes its rows' place.
  std::vector<std::int64_t> shard_begin;
};

// Where a batch's count matrix comes from.
enum class CountsFrom {
  kWholeBatch,  // computed from all ids, which the batch must have
  kGathering,   // from what each rank's Stage counted
  kRanks,       // from Engine::ExchangeCounts
  kNobody,      // none: the batch is dispatched uncounted
};

struct BatchResult {
  std::vector<std::byte> output;                      // [T, H]
  std::vector<absl::Status> statuses;                 // [R] the first error of each rank
  std::vector<std::int64_t> rows_per_expert;          // [E] as the ranks counted while computing
  std::vector<std::int64_t> counted_rows_per_expert;  // [E] as Stage counted
  std::vector<runtime::BatchTimes> times;             // [R]
  std::vector<runtime::CountMatrix> matrices;         // [R] as each rank had it

  bool ok() const {
    for (const absl::Status& status : statuses) {
      if (!status.ok()) return false;
    }
    return true;
  }
};

class EngineCluster {
 public:
  // On as many ranks as the backend's machine has room for, up to `wanted_ranks`.
  EngineCluster(const std::string& checkpoint_dir, int wanted_ranks,
                std::int64_t max_batch_tokens = 64, int compute_threads = 1,
                absl::Duration peer_timeout = absl::Seconds(60), bool fp8_dispatch = false) {
    static int number = 0;
    const int num_ranks = NumTestRanks(wanted_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) {
      runtime::EngineOptions options;
      options.checkpoint_dir = checkpoint_dir;
      options.cluster_id =
          "engine-test-" + std::to_string(::getpid()) + "-" + std::to_string(number);
      options.max_batch_tokens = max_batch_tokens;
      options.compute_threads = compute_threads;
      options.peer_timeout = peer_timeout;
      options.cuda.fp8_dispatch = fp8_dispatch;
      auto engine = CreateTestEngine(options, rank);
      EXPECT_TRUE(engine.ok()) << engine.status();
      engines_.push_back(*std::move(engine));
    }
    ++number;
    placement_ = runtime::EvenPlacement(engines_[0]->model().num_experts, num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) {
      const absl::Status status = engines_[rank]->LoadExperts(placement_, rank, nullptr);
      EXPECT_TRUE(status.ok()) << status;
    }
  }

  ~EngineCluster() {
    for (const auto& engine : engines_) engine->CloseEpoch();
  }

  int num_ranks() const { return static_cast<int>(engines_.size()); }
  runtime::Engine& engine(int rank) { return *engines_[static_cast<std::size_t>(rank)]; }
  const runtime::Placement& placement() const { return placement_; }

  void StartEpoch(std::uint64_t epoch) {
    std::vector<std::string> handles;
    for (const auto& engine : engines_) {
      engine->CloseEpoch();
      auto handle = engine->CreateHeap(epoch);
      ASSERT_TRUE(handle.ok()) << handle.status();
      handles.push_back(*handle);
    }
    for (const auto& engine : engines_) {
      const absl::Status status = engine->OpenPeers(handles);
      ASSERT_TRUE(status.ok()) << status;
    }
    for (const auto& engine : engines_) engine->SealHeap();
  }

  // Runs one batch on all ranks; may be called from several threads, for different slots.
  BatchResult Run(const Batch& batch, CountsFrom counts_from = CountsFrom::kGathering) {
    const auto num_ranks = static_cast<std::size_t>(this->num_ranks());
    const auto row_bytes =
        static_cast<std::size_t>(engines_[0]->model().hidden) * runtime::DataTypeBytes(batch.dtype);
    BatchResult result;
    result.output.assign(batch.hidden.size(), std::byte{0xff});  // Poisoned.
    std::optional<ManyMappings> seen;
    if (!batch.shard_begin.empty()) seen.emplace(batch.hidden, this->num_ranks());
    result.statuses.resize(num_ranks);
    result.times.resize(num_ranks);
    result.matrices.resize(num_ranks);
    result.rows_per_expert.resize(static_cast<std::size_t>(engines_[0]->model().num_experts));
    result.counted_rows_per_expert.resize(result.rows_per_expert.size());
    runtime::CountMatrix counts;
    counts.num_ranks = this->num_ranks();
    counts.rows.resize(num_ranks * num_ranks);
    counts.rows_per_expert.resize(result.rows_per_expert.size());
    std::mutex mutex;
    std::barrier gathered(this->num_ranks());
    std::vector<std::thread> threads;
    for (std::size_t rank = 0; rank < num_ranks; ++rank) {
      threads.emplace_back([&, rank] {
        const runtime::RowRange shard = ShardOfRank(batch, static_cast<int>(rank));
        runtime::ShardInput input = MakeInput(batch, shard, row_bytes);
        if (!batch.shard_begin.empty()) {
          input.shared = {batch.shard_begin, seen->view(rank), batch.ids.data(),
                          batch.weights.data()};
          input.output = seen->view(rank) + static_cast<std::size_t>(shard.begin) * row_bytes;
          input.hidden = input.output;
        }
        auto staged = engines_[rank]->Stage(input);
        if (staged.ok()) {
          const std::lock_guard lock(mutex);
          std::copy(staged->rows_to_rank.begin(), staged->rows_to_rank.end(),
                    counts.rows.begin() + static_cast<std::ptrdiff_t>(rank * num_ranks));
          for (std::size_t e = 0; e < counts.rows_per_expert.size(); ++e) {
            counts.rows_per_expert[e] += staged->rows_per_expert[e];
          }
        }
        gathered.arrive_and_wait();
        absl::StatusOr<runtime::CountMatrix> matrix = counts;
        if (!staged.ok()) {
          matrix = staged.status();
        } else if (counts_from == CountsFrom::kRanks) {
          matrix = engines_[rank]->ExchangeCounts(batch.slot);
        } else if (counts_from == CountsFrom::kWholeBatch) {
          matrix = runtime::ComputeCountMatrix(batch.ids, batch.num_tokens, batch.topk, placement_);
        }
        if (matrix.ok()) result.matrices[rank] = *matrix;
        std::vector<std::int64_t> local_rows;
        result.statuses[rank] =
            matrix.ok()
                ? RunRank(batch, rank, counts_from == CountsFrom::kNobody ? nullptr : &*matrix,
                          (batch.shard_begin.empty() ? result.output.data() : seen->view(rank)) +
                              static_cast<std::size_t>(shard.begin) * row_bytes,
                          &result.times[rank], &local_rows)
                : matrix.status();
        if (!result.statuses[rank].ok()) engines_[rank]->Discard(batch.slot);
        const std::lock_guard lock(mutex);
        std::copy(local_rows.begin(), local_rows.end(),
                  result.rows_per_expert.begin() + placement_.first_expert[rank]);
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (!batch.shard_begin.empty()) {
      std::copy_n(seen->view(0), result.output.size(), result.output.begin());
    }
    result.counted_rows_per_expert = counts.rows_per_expert;
    return result;
  }

 private:
  runtime::RowRange ShardOfRank(const Batch& batch, int rank) const {
    if (batch.shard_begin.empty()) return runtime::ShardOf(batch.num_tokens, num_ranks(), rank);
    const auto index = static_cast<std::size_t>(rank);
    return {batch.shard_begin[index], batch.shard_begin[index + 1]};
  }

  static runtime::ShardInput MakeInput(const Batch& batch, const runtime::RowRange& shard,
                                       std::size_t row_bytes) {
    runtime::ShardInput input;
    input.slot = batch.slot;
    input.sequence = batch.sequence;
    input.layer = batch.layer;
    input.dtype = batch.dtype;
    input.num_tokens = shard.size();
    input.topk = batch.topk;
    input.hidden = batch.hidden.data() + static_cast<std::size_t>(shard.begin) * row_bytes;
    if (!batch.ids.empty()) {
      input.topk_ids = batch.ids.data() + shard.begin * batch.topk;
      input.topk_weights = batch.weights.data() + shard.begin * batch.topk;
    }
    return input;
  }

  absl::Status RunRank(const Batch& batch, std::size_t rank, const runtime::CountMatrix* counts,
                       std::byte* output, runtime::BatchTimes* times,
                       std::vector<std::int64_t>* local_rows) {
    runtime::Engine& engine = *engines_[rank];
    auto dispatched = counts != nullptr ? engine.Dispatch(batch.slot, *counts)
                                        : engine.DispatchUncounted(batch.slot);
    if (!dispatched.ok()) return dispatched;
    if (auto status = engine.RunExperts(batch.slot); !status.ok()) return status;
    if (auto status = engine.Combine(batch.slot); !status.ok()) return status;
    const runtime::RowRange shard = ShardOfRank(batch, static_cast<int>(rank));
    const auto shard_bytes = static_cast<std::size_t>(shard.size() * engine.model().hidden) *
                             runtime::DataTypeBytes(batch.dtype);
    // Where the engine shows its output before Finish, it is the one that Finish gives.
    const std::byte* const combined = engine.CombinedRows(batch.slot);
    const std::vector<std::byte> shown(combined,
                                       combined == nullptr ? nullptr : combined + shard_bytes);
    auto status = engine.Finish(batch.slot, output, times, local_rows);
    if (status.ok() && !std::equal(shown.begin(), shown.end(), output)) {
      return absl::InternalError("CombinedRows differ from what Finish gave");
    }
    return status;
  }

  std::vector<std::unique_ptr<runtime::Engine>> engines_;
  runtime::Placement placement_;
};

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_RUNTIME_ENGINE_ENGINE_CLUSTER_H_
