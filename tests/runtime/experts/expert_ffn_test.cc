#include "runtime/experts/expert_ffn.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace epserve::runtime {
namespace {

struct Shape {
  std::int64_t hidden, intermediate, experts, rows;
  int topk;
};

// Random weights and rows, the call on them, and the same in fp64.
class Fixture {
 public:
  Fixture(const Shape& shape, DataType dtype, std::uint64_t seed)
      : shape_(shape), dtype_(dtype), random_(seed) {
    Fill(&gate_up_, shape.experts * 2 * shape.intermediate * shape.hidden, shape.hidden);
    Fill(&down_, shape.experts * shape.hidden * shape.intermediate, shape.intermediate);
    Fill(&weights_, shape.rows * shape.topk, 1);
    std::vector<float> x;
    Fill(&x, shape.rows * shape.hidden, 1);
    stored_.resize(x.size() * DataTypeBytes(dtype));
    ConvertFromFloat(dtype, x.data(), stored_.data(), x.size());
    ids_.resize(static_cast<std::size_t>(shape.rows * shape.topk));
    // Of all ids a fifth is -1; some stand twice in a row.
    for (std::int32_t& id : ids_) {
      id = random_() % 5 == 0 ? -1 : static_cast<std::int32_t>(random_() % shape.experts);
    }
  }

  std::size_t row_bytes() const {
    return static_cast<std::size_t>(shape_.hidden) * DataTypeBytes(dtype_);
  }
  std::byte* row(std::int64_t index) {
    return stored_.data() + static_cast<std::size_t>(index) * row_bytes();
  }
  std::vector<std::int32_t>& ids() { return ids_; }
  const std::vector<std::int64_t>& expert_rows() const { return expert_rows_; }
  const std::vector<std::byte>& partials() const { return partials_; }

  ExpertFfn::Config Config(int threads) const {
    return {.hidden = shape_.hidden,
            .intermediate = shape_.intermediate,
            .max_rows = shape_.rows,
            .max_local_experts = shape_.experts,
            .max_topk = shape_.topk,
            .threads = threads};
  }

  // The rows' results as fp32; each call on poisoned memory.
  std::vector<float> Run(int threads = 1) {
    const auto ffn = ExpertFfn::Create(Config(threads));
    return RunOn(ffn.get());
  }
  std::vector<float> RunOn(ExpertFfn* ffn) {
    partials_.assign(stored_.size(), std::byte{0xff});
    expert_rows_.assign(static_cast<std::size_t>(shape_.experts), 0);
    std::vector<const std::byte*> rows;
    for (std::int64_t i = 0; i < shape_.rows; ++i) rows.push_back(row(i));
    LayerWeights layer;
    layer.num_local_experts = shape_.experts;
    layer.hidden = shape_.hidden;
    layer.intermediate = shape_.intermediate;
    layer.gate_up = gate_up_.data();
    layer.down = down_.data();
    ReceivedRows received;
    received.dtype = dtype_;
    received.num_rows = shape_.rows;
    received.topk = shape_.topk;
    received.rows = rows;
    received.local_experts = ids_.data();
    received.weights = weights_.data();
    received.partial_rows = partials_.data();
    std::vector<float> sums(static_cast<std::size_t>(MaxSumRows(shape_.rows) * shape_.hidden), -1);
    received.sums = sums.data();
    ffn->Run(layer, received, expert_rows_);
    std::vector<float> result(static_cast<std::size_t>(shape_.rows * shape_.hidden));
    ConvertToFloat(dtype_, partials_.data(), result.data(), result.size());
    return result;
  }

  std::vector<double> Reference() {
    const auto hidden = static_cast<std::size_t>(shape_.hidden);
    const auto intermediate = static_cast<std::size_t>(shape_.intermediate);
    std::vector<double> out(static_cast<std::size_t>(shape_.rows) * hidden);
    std::vector<float> x(hidden);
    std::vector<double> middle(intermediate);
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      if (ids_[i] < 0) continue;
      const std::size_t r = i / static_cast<std::size_t>(shape_.topk);
      ConvertToFloat(dtype_, row(static_cast<std::int64_t>(r)), x.data(), hidden);
      const float* gate =
          gate_up_.data() + 2 * static_cast<std::size_t>(ids_[i]) * hidden * intermediate;
      const float* up = gate + hidden * intermediate;
      const float* down = down_.data() + static_cast<std::size_t>(ids_[i]) * hidden * intermediate;
      for (std::size_t m = 0; m < intermediate; ++m) {
        double g = 0.0, u = 0.0;
        for (std::size_t h = 0; h < hidden; ++h) {
          g += static_cast<double>(gate[m * hidden + h]) * x[h];
          u += static_cast<double>(up[m * hidden + h]) * x[h];
        }
        middle[m] = g / (1.0 + std::exp(-g)) * u;
      }
      for (std::size_t h = 0; h < hidden; ++h) {
        double y = 0.0;
        for (std::size_t m = 0; m < intermediate; ++m) y += down[h * intermediate + m] * middle[m];
        out[r * hidden + h] += weights_[i] * y;
      }
    }
    return out;
  }

 private:
  void Fill(std::vector<float>* values, std::int64_t count, std::int64_t fan_in) {
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(fan_in)));
    values->resize(static_cast<std::size_t>(count));
    for (float& value : *values) value = normal(random_);
  }

  const Shape shape_;
  const DataType dtype_;
  std::mt19937_64 random_;
  std::vector<float> gate_up_, down_, weights_;
  std::vector<std::byte> stored_, partials_;
  std::vector<std::int32_t> ids_;
  std::vector<std::int64_t> expert_rows_;
};

double RelativeError(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

// Odd sizes, one row, and more pairs of one expert than a tile holds.
const Shape kShapes[] = {{64, 96, 8, 50, 4},
                         {37, 19, 3, 7, 2},
                         {16, 16, 1, 1, 1},
                         {40, 24, 2, 700, 3},
                         {128, 256, 16, 33, 16}};

TEST(ExpertFfnTest, Fp32RowsMatchDoubleReference) {
  for (const Shape& shape : kShapes) {
    Fixture fixture(shape, DataType::kFp32, 1);
    fixture.ids()[0] = 0;  // The smallest shape has one pair, which must not be -1.
    EXPECT_LE(RelativeError(fixture.Run(), fixture.Reference()), 1e-6) << shape.hidden;
  }
}

TEST(ExpertFfnTest, NarrowRowsMatchDoubleReferenceWithinTheirRounding) {
  for (const Shape& shape : kShapes) {
    Fixture bf16(shape, DataType::kBf16, 2);
    bf16.ids()[0] = 0;
    EXPECT_LE(RelativeError(bf16.Run(), bf16.Reference()), 4e-3) << shape.hidden;
    Fixture fp16(shape, DataType::kFp16, 3);
    fp16.ids()[0] = 0;
    EXPECT_LE(RelativeError(fp16.Run(), fp16.Reference()), 5e-4) << shape.hidden;
  }
}

TEST(ExpertFfnTest, MoreRowsThanOneChunkMatchDoubleReference) {
  Fixture fixture({16, 16, 4, 5000, 2}, DataType::kFp32, 4);
  EXPECT_LE(RelativeError(fixture.Run(), fixture.Reference()), 1e-6);
}

TEST(ExpertFfnTest, SeveralThreadsMatchDoubleReferenceWithSameBitsEachTime) {
  for (const int threads : {2, 3, 5}) {
    for (const Shape& shape : {kShapes[0], kShapes[1], kShapes[3]}) {
      Fixture fixture(shape, DataType::kFp32, 5);
      const auto ffn = ExpertFfn::Create(fixture.Config(threads));
      const std::vector<float> first = fixture.RunOn(ffn.get());
      EXPECT_LE(RelativeError(first, fixture.Reference()), 1e-6);
      const std::vector<std::byte> bits = fixture.partials();
      for (int again = 0; again < 3; ++again) {
        fixture.RunOn(ffn.get());
        EXPECT_EQ(fixture.partials(), bits) << threads << " threads";
      }
    }
  }
}

TEST(ExpertFfnTest, NonFiniteRowTouchesItselfAlone) {
  for (const DataType dtype : {DataType::kFp32, DataType::kBf16}) {
    for (const std::int64_t rows : {3, 20, 600}) {
      const Shape shape{48, 80, 4, rows, 3};
      Fixture fixture(shape, dtype, 6);
      for (std::size_t k = 0; k < 6; ++k) fixture.ids()[k] = static_cast<std::int32_t>(k % 4);
      fixture.Run();
      const std::vector<std::byte> clean = fixture.partials();
      for (const float poison :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        const std::vector<float> values(static_cast<std::size_t>(shape.hidden), poison);
        ConvertFromFloat(dtype, values.data(), fixture.row(1), values.size());
        const std::vector<float> dirty = fixture.Run();
        EXPECT_FALSE(std::isfinite(dirty[static_cast<std::size_t>(shape.hidden)]));
        for (std::int64_t r = 0; r < rows; ++r) {
          if (r == 1) continue;
          const std::size_t at = static_cast<std::size_t>(r) * fixture.row_bytes();
          EXPECT_EQ(
              std::memcmp(fixture.partials().data() + at, clean.data() + at, fixture.row_bytes()),
              0)
              << "row " << r << " of " << rows;
        }
      }
    }
  }
}

TEST(ExpertFfnTest, RowWithoutLocalExpertsGivesZeros) {
  Fixture fixture(kShapes[0], DataType::kBf16, 7);
  for (std::size_t k = 0; k < 4; ++k) fixture.ids()[4 * 5 + k] = -1;
  const std::vector<float> out = fixture.Run();
  for (std::size_t h = 0; h < 64; ++h) EXPECT_EQ(out[5 * 64 + h], 0.0f);
}

TEST(ExpertFfnTest, IdTwiceInARowCountsTwice) {
  Fixture fixture({32, 32, 2, 1, 2}, DataType::kFp32, 8);
  fixture.ids() = {1, 1};
  EXPECT_LE(RelativeError(fixture.Run(), fixture.Reference()), 1e-6);
  EXPECT_EQ(fixture.expert_rows(), (std::vector<std::int64_t>{0, 2}));
}

TEST(ExpertFfnTest, RowsPerExpertAreAddedToWhatIsThere) {
  // More than one chunk of rows, each of which adds its own.
  Fixture fixture({16, 16, 4, 5000, 2}, DataType::kFp32, 9);
  fixture.Run();
  std::vector<std::int64_t> want(4);
  for (const std::int32_t id : fixture.ids()) {
    if (id >= 0) ++want[static_cast<std::size_t>(id)];
  }
  EXPECT_EQ(fixture.expert_rows(), want);
}

TEST(ExpertFfnTest, NoRowsAndNoExpertsAreOrdinary) {
  Fixture fixture({16, 16, 2, 4, 2}, DataType::kFp32, 10);
  const auto ffn = ExpertFfn::Create(fixture.Config(2));
  ReceivedRows received;
  received.topk = 2;
  LayerWeights layer;
  ffn->Run(layer, received, {});
}

}  // namespace
}  // namespace epserve::runtime
