#include "runtime/experts/expert_ffn.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "runtime/base/dtype.h"
#include "runtime/base/simd.h"
#include "runtime/experts/sgemm.h"
#include "runtime/experts/swiglu.h"
#include "runtime/experts/team.h"

namespace epserve::runtime {
namespace {

// Rows of one expert that go through the GEMMs together. At 256 rows the GEMM is within 5 % of its
// best rate (see sgemm.h's machine: 95 of 100 GFLOP/s), and the tile stays a few MiB.
constexpr std::int64_t kTileRows = 256;
// Received rows that are grouped by expert together, at most.
constexpr std::int64_t kChunkRows = 2048;
// Columns of gate and of up that a member makes before it multiplies them.
constexpr std::int64_t kUpColumns = 512;
constexpr std::size_t kAlignment = 64;

// Aligned floats that become resident only as they are used.
class Workspace {
 public:
  explicit Workspace(std::int64_t floats)
      : bytes_(static_cast<std::size_t>(std::max<std::int64_t>(floats, 1)) * sizeof(float)),
        data_(static_cast<float*>(::operator new (bytes_, std::align_val_t{kAlignment}))) {}
  ~Workspace() { ::operator delete (data_, std::align_val_t{kAlignment}); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  const std::size_t bytes_;
  float* const data_;
};

EPS_MULTIVERSION void AddScaled(const float* row, float weight, std::int64_t count, float* sum) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
}

// The same where the sum is zero before. Zero is added all the same, for the sign of its zeros.
EPS_MULTIVERSION void SetScaled(const float* row, float weight, std::int64_t count, float* sum) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] = 0.0f + weight * row[i];
}

// Part `index` of `count` split into `parts`, with bounds that are multiples of 16 floats, so that
// no two members write to one cache line.
RowRange PartOf(std::int64_t count, int parts, int index) {
  constexpr std::int64_t kGrain = 16;
  const std::int64_t grains = (count + kGrain - 1) / kGrain;
  return {std::min(count, grains * index / parts * kGrain),
          std::min(count, grains * (index + 1) / parts * kGrain)};
}

// Members split the columns of every GEMM, never its sums, and a row's experts are added in
// ascending order, so that no result depends on timing.
class HostExpertFfn final : public ExpertFfn, private Team::Job {
 public:
  explicit HostExpertFfn(const Config& config)
      : config_(config),
        chunk_rows_(std::min(MaxSumRows(config.max_rows), kChunkRows)),
        // A row may name one expert up to K times.
        tile_rows_(std::min(kTileRows, chunk_rows_ * config.max_topk)),
        x_(tile_rows_ * config.hidden),
        mid_(tile_rows_ * config.intermediate),
        up_columns_(std::min(kUpColumns, config.intermediate)),
        up_(tile_rows_ * up_columns_ * config.threads),
        expert_begin_(static_cast<std::size_t>(config.max_local_experts) + 1),
        pairs_(static_cast<std::size_t>(chunk_rows_ * config.max_topk)),
        last_pair_(static_cast<std::size_t>(chunk_rows_)),
        team_(config.threads) {}

  std::uint64_t workspace_bytes() const override {
    return x_.bytes() + mid_.bytes() + up_.bytes() + expert_begin_.size() * sizeof(std::int64_t) +
           pairs_.size() * sizeof(Pair) + last_pair_.size() * sizeof(last_pair_[0]);
  }

  void Run(const LayerWeights& layer, const ReceivedRows& received,
           std::span<std::int64_t> local_expert_rows) override {
    layer_ = &layer;
    received_ = &received;
    for (chunk_begin_ = 0; chunk_begin_ < received.num_rows; chunk_begin_ += chunk_rows_) {
      chunk_size_ = std::min(chunk_rows_, received.num_rows - chunk_begin_);
      GroupByExpert(local_expert_rows);
      MarkEnds();
      team_.Run(this);
    }
  }

 private:
  struct Pair {
    std::int32_t row;  // in the chunk
    float weight;
    bool is_first;  // of the row's, in the order in which they are added
    bool is_last;
  };

  // Lists the chunk's (row, weight) pairs of each expert, in the order of rows, then of k.
  void GroupByExpert(std::span<std::int64_t> local_expert_rows) {
    const int topk = received_->topk;
    const std::int32_t* experts = received_->local_experts + chunk_begin_ * topk;
    const float* weights = received_->weights + chunk_begin_ * topk;
    const std::int64_t num_experts = layer_->num_local_experts;
    std::fill_n(expert_begin_.begin(), num_experts + 1, 0);
    const auto is_local = [&](std::int32_t e) { return e >= 0 && e < num_experts; };
    for (std::int64_t i = 0; i < chunk_size_ * topk; ++i) {
      if (is_local(experts[i])) ++expert_begin_[static_cast<std::size_t>(experts[i])];
    }
    std::int64_t total = 0;
    for (std::int64_t e = 0; e < num_experts; ++e) {
      auto& begin = expert_begin_[static_cast<std::size_t>(e)];
      local_expert_rows[static_cast<std::size_t>(e)] += begin;
      total += std::exchange(begin, total);
    }
    expert_begin_[static_cast<std::size_t>(num_experts)] = total;
    for (std::int64_t i = 0; i < chunk_size_ * topk; ++i) {
      if (!is_local(experts[i])) continue;
      auto& next = expert_begin_[static_cast<std::size_t>(experts[i])];
      pairs_[static_cast<std::size_t>(next++)] = {static_cast<std::int32_t>(i / topk), weights[i],
                                                  false, false};
    }
    // Filling has moved each begin to its expert's end, which is the next one's begin.
    for (std::int64_t e = num_experts; e > 0; --e) {
      expert_begin_[static_cast<std::size_t>(e)] = expert_begin_[static_cast<std::size_t>(e - 1)];
    }
    expert_begin_[0] = 0;
  }

  // A row's sum begins with its first pair and is done with its last, so that no pass over the sums
  // clears them before, or converts them after: of a row with one expert they are not touched.
  void MarkEnds() {
    std::fill_n(last_pair_.begin(), chunk_size_, -1);
    const std::int64_t num_pairs =
        expert_begin_[static_cast<std::size_t>(layer_->num_local_experts)];
    for (std::int64_t p = 0; p < num_pairs; ++p) {
      Pair& pair = pairs_[static_cast<std::size_t>(p)];
      std::int32_t& last = last_pair_[static_cast<std::size_t>(pair.row)];
      pair.is_first = last < 0;
      last = static_cast<std::int32_t>(p);
    }
    for (std::int64_t row = 0; row < chunk_size_; ++row) {
      const std::int32_t last = last_pair_[static_cast<std::size_t>(row)];
      if (last >= 0) {
        pairs_[static_cast<std::size_t>(last)].is_last = true;
      } else {
        std::memset(PartialRow(row), 0, RowBytes());
      }
    }
  }

  std::size_t RowBytes() const {
    return static_cast<std::size_t>(config_.hidden) * DataTypeBytes(received_->dtype);
  }
  // Of the chunk's row.
  std::byte* PartialRow(std::int64_t row) const {
    return received_->partial_rows + static_cast<std::size_t>(chunk_begin_ + row) * RowBytes();
  }
  // Rows that are fp32 are summed up in their place.
  float* SumOf(std::int64_t row) const {
    if (received_->dtype == DataType::kFp32) return reinterpret_cast<float*>(PartialRow(row));
    return received_->sums + row * config_.hidden;
  }

  void RunMember(int member) override {
    for (std::int64_t e = 0; e < layer_->num_local_experts; ++e) {
      const std::int64_t begin = expert_begin_[static_cast<std::size_t>(e)];
      const std::int64_t end = expert_begin_[static_cast<std::size_t>(e) + 1];
      for (std::int64_t tile = begin; tile < end; tile += tile_rows_) {
        RunTile(member, e,
                {pairs_.data() + tile, static_cast<std::size_t>(std::min(tile_rows_, end - tile))});
      }
    }
  }

  // Adds a row of what down made, or part of it, to the row's sum.
  void Accumulate(const Pair& pair, RowRange columns, float* product) {
    const std::int64_t count = columns.size();
    float* sum = SumOf(pair.row) + columns.begin;
    const bool converts = received_->dtype != DataType::kFp32 && pair.is_last;
    if (converts && pair.is_first) {
      SetScaled(product, pair.weight, count, product);  // It is this member's own.
      sum = product;
    } else if (pair.is_first) {
      SetScaled(product, pair.weight, count, sum);
    } else {
      AddScaled(product, pair.weight, count, sum);
    }
    if (!converts) return;
    const std::size_t element_bytes = DataTypeBytes(received_->dtype);
    ConvertFromFloat(received_->dtype, sum,
                     PartialRow(pair.row) + static_cast<std::size_t>(columns.begin) * element_bytes,
                     static_cast<std::size_t>(count));
  }

  // One expert's down(silu(gate(x)) * up(x)) of some rows, added to their sums with their weights.
  void RunTile(int member, std::int64_t expert, std::span<const Pair> pairs) {
    const std::int64_t hidden = config_.hidden;
    const std::int64_t intermediate = config_.intermediate;
    const auto num_rows = static_cast<std::int64_t>(pairs.size());
    team_.Barrier();  // What the last tile left in x_ is read no more.
    const RowRange gathered = ShardOf(num_rows, team_.size(), member);
    for (std::int64_t i = gathered.begin; i < gathered.end; ++i) {
      const std::int64_t row = chunk_begin_ + pairs[static_cast<std::size_t>(i)].row;
      ConvertToFloat(received_->dtype, received_->rows[static_cast<std::size_t>(row)],
                     x_.data() + i * hidden, static_cast<std::size_t>(hidden));
    }
    team_.Barrier();  // The tile is gathered.
    RunGateUp(member, expert, num_rows, PartOf(intermediate, team_.size(), member));
    team_.Barrier();  // mid_ is complete, and the gathered rows are read no more.
    const RowRange columns = PartOf(hidden, team_.size(), member);
    if (columns.size() == 0) return;
    const float* down = layer_->down + expert * hidden * intermediate;
    Sgemm({.m = num_rows,
           .n = columns.size(),
           .k = intermediate,
           .x = mid_.data(),
           .ldx = intermediate,
           .w = down + columns.begin * intermediate,
           .y = x_.data() + columns.begin,
           .ldy = hidden});
    for (std::int64_t i = 0; i < num_rows; ++i) {
      Accumulate(pairs[static_cast<std::size_t>(i)], columns,
                 x_.data() + i * hidden + columns.begin);
    }
  }

  // mid_[:, part] = silu(x . gate^T) * (x . up^T).
  void RunGateUp(int member, std::int64_t expert, std::int64_t num_rows, RowRange part) {
    const std::int64_t hidden = config_.hidden;
    const std::int64_t intermediate = config_.intermediate;
    const float* gate = layer_->gate_up + expert * 2 * intermediate * hidden;
    const float* up = gate + intermediate * hidden;
    float* const products = up_.data() + member * tile_rows_ * up_columns_;
    for (std::int64_t begin = part.begin; begin < part.end; begin += up_columns_) {
      const std::int64_t columns = std::min(up_columns_, part.end - begin);
      SgemmArgs gemm{.m = num_rows,
                     .n = columns,
                     .k = hidden,
                     .x = x_.data(),
                     .ldx = hidden,
                     .w = gate + begin * hidden,
                     .y = mid_.data() + begin,
                     .ldy = intermediate};
      Sgemm(gemm);
      gemm.w = up + begin * hidden;
      gemm.y = products;
      gemm.ldy = columns;
      Sgemm(gemm);
      for (std::int64_t i = 0; i < num_rows; ++i) {
        SwiGlu(mid_.data() + i * intermediate + begin, products + i * columns,
               static_cast<std::size_t>(columns));
      }
    }
  }

  const Config config_;
  const std::int64_t chunk_rows_;
  const std::int64_t tile_rows_;
  const Workspace x_;    // [tile, H] rows of one expert, then what down makes of them
  const Workspace mid_;  // [tile, I] gate, then what SwiGLU makes of it
  const std::int64_t up_columns_;
  const Workspace up_;                      // [threads, tile, up_columns] of up; a member's own
  std::vector<std::int64_t> expert_begin_;  // [E_local + 1] into pairs_
  std::vector<Pair> pairs_;                 // [chunk * K]
  std::vector<std::int32_t> last_pair_;     // [chunk] of the row, so far; -1: none

  // The running call's.
  const LayerWeights* layer_ = nullptr;
  const ReceivedRows* received_ = nullptr;
  std::int64_t chunk_begin_ = 0;
  std::int64_t chunk_size_ = 0;

  Team team_;  // Last: its threads use all of the above.
};

}  // namespace

std::unique_ptr<ExpertFfn> ExpertFfn::Create(const Config& config) {
  return std::make_unique<HostExpertFfn>(config);
}

}  // namespace epserve::runtime
