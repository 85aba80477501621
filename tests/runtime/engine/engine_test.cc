// Whole batches through engines of every layout, held against an fp64 reference.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "runtime/checkpoint/checkpoint.h"
#include "tests/runtime/engine/engine_cluster.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/reference_router.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::Batch;
using ::epserve::testing::BatchResult;
using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::EngineCluster;
using ::epserve::testing::TempDirectory;

// The model once more in fp64; expert outputs are computed where a token asks for them.
class Reference {
 public:
  explicit Reference(const CheckpointSpec& spec) : spec_(spec) {}

  std::vector<double> Output(const Batch& batch, const std::vector<std::int32_t>& ids,
                             const std::vector<double>& weights) {
    const auto hidden = static_cast<std::size_t>(spec_.hidden);
    std::vector<double> out(static_cast<std::size_t>(batch.num_tokens) * hidden);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0) continue;
      const std::size_t token = i / static_cast<std::size_t>(batch.topk);
      const std::vector<double> y = Expert(batch.layer, ids[i], Row(batch, token));
      for (std::size_t h = 0; h < hidden; ++h) out[token * hidden + h] += weights[i] * y[h];
    }
    return out;
  }

  bool fp8_weights() const { return spec_.dtype == DataType::kFp8E4m3; }

  std::vector<double> Row(const Batch& batch, std::size_t token) const {
    const auto hidden = static_cast<std::size_t>(spec_.hidden);
    std::vector<float> row(hidden);
    ConvertToFloat(batch.dtype, batch.hidden.data() + token * hidden * DataTypeBytes(batch.dtype),
                   row.data(), hidden);
    return {row.begin(), row.end()};
  }

 private:
  struct Weights {
    std::vector<double> gate, up, down;
  };

  std::vector<double> Expert(std::int64_t layer, std::int64_t expert,
                             const std::vector<double>& x) {
    auto& weights = weights_[{layer, expert}];
    if (weights.gate.empty()) {
      weights = {testing::ReferenceWeight(spec_, layer, expert, "gate"),
                 testing::ReferenceWeight(spec_, layer, expert, "up"),
                 testing::ReferenceWeight(spec_, layer, expert, "down")};
    }
    const auto intermediate = static_cast<std::size_t>(spec_.intermediate);
    std::vector<double> middle(intermediate);
    for (std::size_t i = 0; i < intermediate; ++i) {
      double g = 0.0, u = 0.0;
      for (std::size_t h = 0; h < x.size(); ++h) {
        g += weights.gate[i * x.size() + h] * x[h];
        u += weights.up[i * x.size() + h] * x[h];
      }
      middle[i] = g / (1.0 + std::exp(-g)) * u;
    }
    std::vector<double> out(x.size());
    for (std::size_t h = 0; h < x.size(); ++h) {
      for (std::size_t i = 0; i < intermediate; ++i) {
        out[h] += weights.down[h * intermediate + i] * middle[i];
      }
    }
    return out;
  }

  const CheckpointSpec spec_;
  std::map<std::pair<std::int64_t, std::int64_t>, Weights> weights_;
};

Batch RandomBatch(const CheckpointSpec& spec, DataType dtype, std::int64_t tokens, int topk,
                  std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Batch batch;
  batch.dtype = dtype;
  batch.num_tokens = tokens;
  batch.topk = topk;
  batch.layer = spec.first_moe_layer + 1;
  std::vector<float> hidden(static_cast<std::size_t>(tokens * spec.hidden));
  for (float& value : hidden) value = normal(random);
  batch.hidden.resize(hidden.size() * DataTypeBytes(dtype));
  ConvertFromFloat(dtype, hidden.data(), batch.hidden.data(), hidden.size());
  for (std::int64_t i = 0; i < tokens * topk; ++i) {
    // One in nine is no expert, and ids may stand twice in a row.
    batch.ids.push_back(random() % 9 == 0 ? -1
                                          : static_cast<std::int32_t>(random() % spec.experts));
    batch.weights.push_back(normal(random));
  }
  return batch;
}

std::vector<float> Widen(const std::vector<std::byte>& bytes, DataType dtype) {
  std::vector<float> values(bytes.size() / DataTypeBytes(dtype));
  ConvertToFloat(dtype, bytes.data(), values.data(), values.size());
  return values;
}

double RelativeError(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm == 0.0 ? std::sqrt(error) : std::sqrt(error / norm);
}

std::vector<CheckpointSpec> Layouts() {
  CheckpointSpec mixtral{.layout = "mixtral", .experts = 10, .topk = 3};
  CheckpointSpec qwen{.layout = "qwen3_moe", .dtype = DataType::kBf16, .experts = 10, .topk = 4};
  qwen.first_moe_layer = 1;
  qwen.shards = 2;
  CheckpointSpec deepseek{.layout = "deepseek_v3", .dtype = DataType::kFp8E4m3};
  deepseek.hidden = 144;
  deepseek.intermediate = testing::kOddIntermediate;
  deepseek.experts = 18;  // Six groups of three, over four ranks.
  deepseek.topk = 4;
  deepseek.first_moe_layer = 1;
  deepseek.groups = 6;
  deepseek.topk_groups = 3;
  deepseek.scaling = 2.5;
  return {mixtral, qwen, deepseek};
}

class EngineTest : public testing::EngineBackendTest {
 protected:
  std::string Write(const CheckpointSpec& spec) {
    const auto path = directory_.path() / std::to_string(number_++);
    testing::WriteCheckpoint(path, spec);
    return path.string();
  }
  TempDirectory directory_;
  int number_ = 0;
};

void ExpectMatches(const Batch& batch, const BatchResult& result, Reference* reference) {
  for (const absl::Status& status : result.statuses) ASSERT_TRUE(status.ok()) << status;
  const std::vector<double> want =
      reference->Output(batch, batch.ids, {batch.weights.begin(), batch.weights.end()});
  const double limit = testing::ErrorLimit(batch.dtype, reference->fp8_weights());
  EXPECT_LE(RelativeError(Widen(result.output, batch.dtype), want), limit)
      << DataTypeName(batch.dtype) << ", " << batch.num_tokens << " tokens";
  EXPECT_EQ(result.rows_per_expert, result.counted_rows_per_expert);
}

TEST_F(EngineTest, GivenIdsMatchDoubleReferenceInEveryLayoutAndRowType) {
  for (const CheckpointSpec& spec : Layouts()) {
    SCOPED_TRACE(spec.layout);
    EngineCluster cluster(Write(spec), 4);
    cluster.StartEpoch(7);
    Reference reference(spec);
    std::uint64_t sequence = 0;
    for (const DataType dtype : {DataType::kFp32, DataType::kBf16, DataType::kFp16}) {
      for (const std::int64_t tokens : {0, 1, 3, 37, 64}) {
        Batch batch = RandomBatch(spec, dtype, tokens, spec.topk, ++sequence);
        batch.sequence = sequence;
        ExpectMatches(batch, cluster.Run(batch), &reference);
      }
    }
  }
}

TEST_F(EngineTest, BatchThatAllRanksSeeGivesThePushedFormsBitsInItsRowsPlace) {
  const CheckpointSpec spec = Layouts().front();
  EngineCluster cluster(Write(spec), 4);
  if (!cluster.engine(0).takes_shared_batches()) GTEST_SKIP() << "this backend takes none";
  cluster.StartEpoch(1);
  std::uint64_t sequence = 0;
  for (const DataType dtype : {DataType::kFp32, DataType::kFp16, DataType::kBf16}) {
    for (const std::vector<std::int64_t>& shard_begin :
         {std::vector<std::int64_t>{0, 0, 0, 1, 1}, {0, 16, 16, 20, 36}, {0, 16, 32, 48, 64}}) {
      Batch batch = RandomBatch(spec, dtype, shard_begin.back(), 3, ++sequence);
      batch.sequence = sequence;
      const BatchResult pushed = cluster.Run(batch);
      ASSERT_TRUE(pushed.ok());
      batch.sequence = ++sequence;
      batch.shard_begin = shard_begin;
      const BatchResult shared = cluster.Run(batch);
      ASSERT_TRUE(shared.ok());
      EXPECT_EQ(shared.output, pushed.output);
      EXPECT_EQ(shared.rows_per_expert, pushed.rows_per_expert);
    }
  }
}

TEST_F(EngineTest, EveryTopkFromOneToSixteenMatches) {
  const CheckpointSpec spec = Layouts()[2];
  EngineCluster cluster(Write(spec), 3);
  cluster.StartEpoch(1);
  Reference reference(spec);
  for (int topk = 1; topk <= 16; ++topk) {
    Batch batch = RandomBatch(spec, DataType::kFp32, 11, topk, static_cast<std::uint64_t>(topk));
    batch.sequence = static_cast<std::uint64_t>(topk);
    ExpectMatches(batch, cluster.Run(batch), &reference);
  }
}

TEST_F(EngineTest, MoreRanksThanExpertsAndOneRankMatch) {
  for (const int ranks : {1, testing::NumTestRanks(5)}) {
    const int experts = ranks > 2 ? 2 : 1;
    const CheckpointSpec spec{.experts = experts, .topk = experts};
    EngineCluster cluster(Write(spec), ranks);
    cluster.StartEpoch(1);
    Reference reference(spec);
    Batch batch = RandomBatch(spec, DataType::kFp32, 23, 2, 3);
    ExpectMatches(batch, cluster.Run(batch), &reference);
    // All on one expert.
    std::fill(batch.ids.begin(), batch.ids.end(), experts - 1);
    batch.sequence = 2;
    ExpectMatches(batch, cluster.Run(batch), &reference);
  }
}

TEST_F(EngineTest, RouterMatchesDoubleReferenceInEveryLayout) {
  for (const CheckpointSpec& spec : Layouts()) {
    SCOPED_TRACE(spec.layout);
    const std::string path = Write(spec);
    EngineCluster cluster(path, 4);
    cluster.StartEpoch(1);
    Reference reference(spec);
    const RouterConfig config = (*Checkpoint::Open(path))->config().router;
    Batch batch = RandomBatch(spec, DataType::kFp32, 60, spec.topk, 5);
    batch.ids.clear();
    batch.weights.clear();
    const BatchResult result = cluster.Run(batch);
    for (const absl::Status& status : result.statuses) ASSERT_TRUE(status.ok()) << status;
    const std::vector<float> got = Widen(result.output, batch.dtype);
    const std::vector<double> gate = testing::ReferenceGate(spec, batch.layer);
    const std::vector<double> bias = spec.layout == "deepseek_v3"
                                         ? testing::ReferenceBias(spec, batch.layer)
                                         : std::vector<double>{};
    const auto hidden = static_cast<std::size_t>(spec.hidden);
    const double limit = testing::ErrorLimit(batch.dtype, reference.fp8_weights());
    // A row is a small sample: over few elements an fp8 error spreads by half. A wrong route is off
    // by ten times that.
    const double row_limit = reference.fp8_weights() ? 1.5 * limit : limit;
    std::vector<float> all_got;
    std::vector<double> all_want;
    int compared = 0;
    for (std::size_t token = 0; token < 60; ++token) {
      const auto routing = testing::RouteInDouble(config, gate, bias, reference.Row(batch, token));
      if (routing.margin < 1e-5) continue;
      ++compared;
      Batch one = batch;
      one.num_tokens = 1;
      const std::size_t row_bytes = hidden * sizeof(float);
      one.hidden.assign(
          batch.hidden.begin() + static_cast<std::ptrdiff_t>(token * row_bytes),
          batch.hidden.begin() + static_cast<std::ptrdiff_t>((token + 1) * row_bytes));
      const std::vector<double> want = reference.Output(one, routing.ids, routing.weights);
      const std::vector<float> row(got.begin() + static_cast<std::ptrdiff_t>(token * hidden),
                                   got.begin() + static_cast<std::ptrdiff_t>((token + 1) * hidden));
      EXPECT_LE(RelativeError(row, want), row_limit) << "token " << token;
      all_got.insert(all_got.end(), row.begin(), row.end());
      all_want.insert(all_want.end(), want.begin(), want.end());
    }
    EXPECT_LE(RelativeError(all_got, all_want), limit);
    EXPECT_GT(compared, 40);
  }
}

TEST_F(EngineTest, TwoSlotsAtOnceMatchWithSameBitsEachTime) {
  const CheckpointSpec spec = Layouts()[1];
  EngineCluster cluster(Write(spec), 4, 64, /*compute_threads=*/2);
  cluster.StartEpoch(1);
  Reference reference(spec);
  std::vector<Batch> batches;
  for (int slot = 0; slot < 2; ++slot) {
    batches.push_back(RandomBatch(spec, slot == 0 ? DataType::kFp32 : DataType::kBf16, 50, 4,
                                  static_cast<std::uint64_t>(slot)));
    batches.back().slot = slot;
  }
  std::vector<std::vector<std::byte>> first(2);
  for (int round = 0; round < 5; ++round) {
    std::vector<BatchResult> results(2);
    std::vector<std::thread> threads;
    for (std::size_t slot = 0; slot < 2; ++slot) {
      batches[slot].sequence = static_cast<std::uint64_t>(2 * round) + slot + 1;
      threads.emplace_back([&, slot] { results[slot] = cluster.Run(batches[slot]); });
    }
    for (std::thread& thread : threads) thread.join();
    for (std::size_t slot = 0; slot < 2; ++slot) {
      ExpectMatches(batches[slot], results[slot], &reference);
      if (round == 0) first[slot] = results[slot].output;
      EXPECT_EQ(results[slot].output, first[slot]) << "slot " << slot << " round " << round;
    }
  }
}

TEST_F(EngineTest, NanInOneTokenTouchesThatTokenAlone) {
  for (const bool routed_by_ids : {true, false}) {
    const CheckpointSpec spec = Layouts()[2];
    EngineCluster cluster(Write(spec), 4);
    cluster.StartEpoch(1);
    Batch batch = RandomBatch(spec, DataType::kFp32, 40, 4, 9);
    std::fill(batch.ids.begin() + 4 * 17, batch.ids.begin() + 4 * 18, 5);
    if (!routed_by_ids) {
      batch.ids.clear();
      batch.weights.clear();
    }
    const std::vector<float> clean = Widen(cluster.Run(batch).output, batch.dtype);
    auto* row = reinterpret_cast<float*>(batch.hidden.data()) + 17 * spec.hidden;
    row[3] = std::numeric_limits<float>::quiet_NaN();
    batch.sequence = 2;
    const BatchResult result = cluster.Run(batch);
    ASSERT_TRUE(result.ok());
    const std::vector<float> dirty = Widen(result.output, batch.dtype);
    const auto hidden = static_cast<std::size_t>(spec.hidden);
    for (std::size_t i = 0; i < dirty.size(); ++i) {
      if (i / hidden == 17) {
        EXPECT_TRUE(std::isnan(dirty[i]));
      } else {
        EXPECT_NEAR(dirty[i], clean[i], testing::kOtherRowsLimit) << "token " << i / hidden;
      }
    }
  }
}

TEST_F(EngineTest, PhasesAreTimed) {
  const CheckpointSpec spec = Layouts()[0];
  EngineCluster cluster(Write(spec), 2);
  cluster.StartEpoch(1);
  const BatchResult result = cluster.Run(RandomBatch(spec, DataType::kFp32, 40, 3, 1));
  ASSERT_TRUE(result.ok());
  for (const BatchTimes& times : result.times) {
    EXPECT_GT(times.dispatch_ns, 0);
    EXPECT_GT(times.ffn_ns, 0);
    EXPECT_GT(times.combine_ns, 0);
  }
}

TEST_F(EngineTest, ReferenceExpertMatchesDoubleReference) {
  for (const CheckpointSpec& spec : Layouts()) {
    EngineCluster cluster(Write(spec), 3);
    const std::int64_t layer = spec.first_moe_layer + 1;
    const std::int64_t expert = cluster.placement().first_expert[1];
    const std::vector<float> x(static_cast<std::size_t>(spec.hidden), 0.5f);
    const auto got = cluster.engine(1).ReferenceExpert(layer, expert, x);
    ASSERT_TRUE(got.ok()) << got.status();
    const auto want = testing::ReferenceExpertOutput(spec, layer, expert, {x.begin(), x.end()});
    EXPECT_LE(RelativeError(*got, want), 1e-6);
    EXPECT_EQ(cluster.engine(0).ReferenceExpert(layer, expert, x).status().code(),
              absl::StatusCode::kFailedPrecondition);
  }
}

}  // namespace
}  // namespace epserve::runtime
