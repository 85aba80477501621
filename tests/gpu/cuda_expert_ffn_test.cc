// The feed-forward's kernels against a plain CPU reference in fp64, on one GPU. Inputs are fresh
// each time; the output, and the rows of x past the last, are poisoned first.
#include "runtime/experts/cuda_expert_ffn.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "runtime/base/cuda_memory.h"
#include "runtime/base/dtype.h"

namespace epserve::runtime {
namespace {

bool HasGpu() {
  int devices = 0;
  const bool found = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  (void)cudaGetLastError();
  return found;
}

bool IsHopper() {
  int major = 0;
  return HasGpu() &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
         major == 9;
}

struct Case {
  std::string name;
  std::int64_t hidden = 64;
  std::int64_t intermediate = 64;
  std::vector<int> rows;  // of each expert
  DataType stored = DataType::kBf16;
  DataType held = DataType::kBf16;
  std::int64_t spare_rows = 37;  // max_rows less M
};

// Spread of rows over experts that meets every kind of tile: none, one row, a whole tile and one
// more, an odd and an even number of tiles, more than a group of tiles.
std::vector<int> MixedRows() { return {0, 1, 63, 64, 65, 127, 128, 129, 0, 256, 257, 300, 0}; }

std::vector<int> OneOf(int experts, int expert, int rows) {
  std::vector<int> all(experts, 0);
  all[expert] = rows;
  return all;
}

std::vector<Case> Cases() {
  using enum DataType;
  std::vector<Case> cases = {
      {"Smallest", 16, 16, {5, 0, 1}},
      {"NarrowModel", 32, 16, {3, 70, 0, 9}},
      {"DimensionsOfNoTile", 272, 144, MixedRows()},
      {"TileEdges", 192, 128, MixedRows()},
      {"WideIntermediate", 128, 1024, {17, 130, 0, 64}},
      {"WideHidden", 1024, 64, {200, 0, 33}},
      {"ZeroRows", 64, 64, {0, 0, 0}},
      {"NoSpareRows", 64, 64, {130, 5}, kBf16, kBf16, 0},
      {"ManyRowsOnOneExpert", 64, 48, OneOf(4, 2, 5000)},
      {"ManyExperts", 48, 32, OneOf(512, 511, 3)},
      {"FromFp16", 80, 48, {20, 70}, kFp16},
      {"FromFp32", 80, 48, {20, 70}, kFp32},
      {"FromFp8", 272, 144, {20, 70}, kFp8E4m3},
      {"HeldFp8", 256, 256, MixedRows(), kFp8E4m3, kFp8E4m3},
      {"HeldFp8DimensionsOfNoTile", 272, 144, MixedRows(), kFp8E4m3, kFp8E4m3},
      {"HeldFp8Smallest", 16, 16, {5, 0, 1}, kFp8E4m3, kFp8E4m3},
      {"HeldFp8Wide", 1024, 384, {65, 0, 200}, kFp8E4m3, kFp8E4m3},
      {"HeldFp8OneExpert", 144, 272, OneOf(5, 3, 2500), kFp8E4m3, kFp8E4m3},
  };
  return cases;
}

template <typename T>
DeviceBuffer Upload(const std::vector<T>& host) {
  const std::size_t bytes = host.size() * sizeof(T);
  absl::StatusOr<DeviceBuffer> created = DeviceBuffer::Create(bytes);
  EXPECT_TRUE(created.ok()) << created.status();
  DeviceBuffer buffer = std::move(created).value();
  EXPECT_EQ(cudaMemcpy(buffer.as<void>(), host.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
  return buffer;
}

template <typename T>
std::vector<T> Download(const void* device, std::size_t count) {
  std::vector<T> host(count);
  EXPECT_EQ(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost),
            cudaSuccess);
  return host;
}

// One tensor: as stored, and the values that a kernel of the held type sees.
struct Tensor {
  std::vector<std::byte> stored;
  std::vector<float> scales;
  std::vector<float> values;
};

Tensor MakeTensor(std::int64_t rows, std::int64_t columns, const Case& c, std::mt19937* random) {
  std::normal_distribution<float> normal;
  const float spread = 1.0f / std::sqrt(static_cast<float>(columns));
  const bool fp8 = c.stored == DataType::kFp8E4m3;
  Tensor t;
  std::vector<float> raw(rows * columns);
  // fp8 bytes use their range; the scales, different in each block, bring them back.
  for (float& v : raw) v = normal(*random) * (fp8 ? 64.0f : spread);
  t.stored.resize(raw.size() * DataTypeBytes(c.stored));
  ConvertFromFloat(c.stored, raw.data(), t.stored.data(), raw.size());
  t.values.resize(raw.size());
  ConvertToFloat(c.stored, t.stored.data(), t.values.data(), raw.size());
  if (fp8) {
    const std::int64_t blocks = (columns + 127) / 128;
    std::uniform_real_distribution<float> scale(0.5f * spread / 64.0f, 2.0f * spread / 64.0f);
    for (std::int64_t i = 0; i < (rows + 127) / 128 * blocks; ++i) {
      t.scales.push_back(scale(*random));
    }
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      t.values[i] *= t.scales[i / columns / 128 * blocks + i % columns / 128];
    }
  }
  if (c.held == DataType::kBf16) {
    for (float& v : t.values) v = Bf16ToFloat(FloatToBf16(v));
  }
  return t;
}

class Problem {
 public:
  explicit Problem(const Case& c, unsigned seed = std::random_device()()) : c_(c), random_(seed) {
    shape_ = {static_cast<int>(c.rows.size()), c.hidden, c.intermediate, c.held};
    auto layer = DeviceBuffer::Create(LayOutFfnWeights(shape_).bytes);
    EXPECT_TRUE(layer.ok()) << layer.status();
    layer_ = std::move(layer).value();
    for (int e = 0; e < shape_.num_local_experts; ++e) {
      gate_.push_back(Pack(e, FfnProjection::kGate, c.intermediate, c.hidden));
      up_.push_back(Pack(e, FfnProjection::kUp, c.intermediate, c.hidden));
      down_.push_back(Pack(e, FfnProjection::kDown, c.hidden, c.intermediate));
    }
    offsets_.resize(c.rows.size() + 1);
    std::partial_sum(c.rows.begin(), c.rows.end(), offsets_.begin() + 1);
    std::normal_distribution<float> normal;
    // NaN past the last row: reading it must change nothing.
    x_.assign(max_rows() * c.hidden, 0xffff);
    for (std::int64_t i = 0; i < num_rows() * c.hidden; ++i) x_[i] = FloatToBf16(normal(random_));
  }

  std::int64_t num_rows() const { return offsets_.back(); }
  std::int64_t max_rows() const { return std::max<std::int64_t>(num_rows() + c_.spare_rows, 1); }
  CudaExpertFfnConfig Config(FfnKernel kernel) const { return {shape_, max_rows(), kernel}; }
  std::vector<std::uint16_t>& x() { return x_; }
  const DeviceBuffer& layer() const { return layer_; }

  // All of y's buffer, as bf16 bits.
  std::vector<std::uint16_t> Run(FfnKernel kernel, bool as_graph = false) {
    auto ffn = CudaExpertFfn::Create(Config(kernel));
    EXPECT_TRUE(ffn.ok()) << ffn.status();
    if (!ffn.ok()) return {};
    EXPECT_EQ((*ffn)->workspace_bytes(), CudaExpertFfn::WorkspaceBytes(Config(kernel)));
    const DeviceBuffer x = Upload(x_);
    const DeviceBuffer offsets = Upload(offsets_);
    const DeviceBuffer y = Upload(std::vector<std::uint16_t>(x_.size(), 0xffff));
    cudaStream_t stream = nullptr;
    EXPECT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    const auto enqueue = [&] {
      return (*ffn)->Run(layer_.as<std::byte>(), x.as<void>(), offsets.as<std::int32_t>(),
                         y.as<void>(), stream);
    };
    if (as_graph) {
      Replay(enqueue, stream);
    } else {
      const absl::Status enqueued = enqueue();
      EXPECT_TRUE(enqueued.ok()) << enqueued;
    }
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    return Download<std::uint16_t>(y.as<void>(), x_.size());
  }

  // With `quantized`, rows are rounded as the Hopper kernel's fp8 scheme rounds them.
  std::vector<double> Reference(bool quantized) const {
    std::vector<double> y(num_rows() * c_.hidden);
    for (std::size_t e = 0; e < c_.rows.size(); ++e) {
      for (std::int64_t r = offsets_[e]; r < offsets_[e + 1]; ++r) {
        std::vector<double> row, middle;
        for (std::int64_t i = 0; i < c_.hidden; ++i) {
          row.push_back(Bf16ToFloat(x_[r * c_.hidden + i]));
        }
        if (quantized) Quantize(&row);
        for (std::int64_t i = 0; i < c_.intermediate; ++i) {
          const double gate = Dot(gate_[e], i, row);
          middle.push_back(gate / (1.0 + std::exp(-gate)) * Dot(up_[e], i, row));
        }
        if (quantized) Quantize(&middle);
        for (std::int64_t h = 0; h < c_.hidden; ++h) {
          y[r * c_.hidden + h] = Dot(down_[e], h, middle);
        }
      }
    }
    return y;
  }

 private:
  Tensor Pack(int expert, FfnProjection projection, std::int64_t rows, std::int64_t columns) {
    Tensor t = MakeTensor(rows, columns, c_, &random_);
    const DeviceBuffer stored = Upload(t.stored);
    const DeviceBuffer scales = Upload(t.scales);
    const CheckpointTensor tensor = {stored.as<void>(), c_.stored,
                                     t.scales.empty() ? nullptr : scales.as<float>()};
    const absl::Status packed =
        PackFfnTensor(shape_, expert, projection, tensor, layer_.as<std::byte>(), nullptr);
    EXPECT_TRUE(packed.ok()) << packed;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return t;
  }

  static void Replay(const std::function<absl::Status()>& enqueue, cudaStream_t stream) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    const absl::Status enqueued = enqueue();
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_TRUE(enqueued.ok()) << enqueued;
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int i = 0; i < 2; ++i) ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    ASSERT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
    ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }

  // To e4m3, with one scale for every 128 columns.
  static void Quantize(std::vector<double>* row) {
    for (std::size_t begin = 0; begin < row->size(); begin += 128) {
      const std::size_t end = std::min(row->size(), begin + 128);
      float largest = 1e-30f;
      for (std::size_t i = begin; i < end; ++i) {
        largest = std::max(largest, std::abs(static_cast<float>((*row)[i])));
      }
      const float scale = largest / 448.0f;
      for (std::size_t i = begin; i < end; ++i) {
        const float scaled = static_cast<float>((*row)[i]) * (1.0f / scale);
        (*row)[i] = Fp8E4m3ToFloat(FloatToFp8E4m3(scaled)) * scale;
      }
    }
  }

  static double Dot(const Tensor& t, std::int64_t row, const std::vector<double>& with) {
    const float* w = t.values.data() + row * with.size();
    double sum = 0.0;
    for (std::size_t i = 0; i < with.size(); ++i) sum += w[i] * with[i];
    return sum;
  }

  const Case c_;
  std::mt19937 random_;
  CudaFfnShape shape_;
  DeviceBuffer layer_;
  std::vector<Tensor> gate_, up_, down_;
  std::vector<std::int32_t> offsets_;
  std::vector<std::uint16_t> x_;
};

struct Errors {
  double worst_row = 0.0;  // L2 error of a row, relative to its norm, or to the mean's if larger
  double all = 0.0;        // of all rows together
};

// Infinite where anything is no number.
Errors ErrorsOf(const std::vector<std::uint16_t>& y, const std::vector<double>& reference,
                std::int64_t hidden) {
  const auto relative = [](double error, double norm) {
    const double e = error == 0.0 ? 0.0 : std::sqrt(error / norm);
    return std::isfinite(e) ? e : HUGE_VAL;
  };
  const std::size_t rows = reference.size() / hidden;
  std::vector<double> error(rows, 0.0), norm(rows, 0.0);
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double difference = Bf16ToFloat(y[i]) - reference[i];
    error[i / hidden] += difference * difference;
    norm[i / hidden] += reference[i] * reference[i];
  }
  const double all_norm = std::accumulate(norm.begin(), norm.end(), 0.0);
  Errors errors;
  errors.all = relative(std::accumulate(error.begin(), error.end(), 0.0), all_norm);
  for (std::size_t r = 0; r < rows; ++r) {
    const double row = relative(error[r], std::max(norm[r], all_norm / static_cast<double>(rows)));
    errors.worst_row = std::max(errors.worst_row, row);
  }
  return errors;
}

// Rounding of what is between the products, of the result, and (portable fp8) of the weights.
constexpr double kLimit = 8e-3;
constexpr double kRowLimit = 1e-2;
// Where a value between the products lies near the middle of two e4m3 numbers, fp32 and fp64 round
// it apart, by up to an eighth of it; in a row that it dominates that is seen.
constexpr double kFp8RowLimit = 0.1;
// What three bits of mantissa cost: 2.4e-2 of the rows, which both factors of SwiGLU bear, and as
// much again between the products. Of few rows the mean strays.
constexpr double kFp8Limit = 4.7e-2;
constexpr std::int64_t kFewRows = 100;

class CudaExpertFfnTest : public testing::TestWithParam<std::tuple<Case, FfnKernel>> {
 protected:
  void SetUp() override {
    if (!HasGpu()) GTEST_SKIP() << "no GPU on this machine";
    if (std::get<1>(GetParam()) == FfnKernel::kHopper && !IsHopper()) {
      GTEST_SKIP() << "the Hopper kernel needs compute capability 9.0";
    }
  }
};

TEST_P(CudaExpertFfnTest, ResultIsTheReferencesAndTheSameEachTime) {
  const auto& [c, kernel] = GetParam();
  Problem problem(c);
  const std::vector<std::uint16_t> y = problem.Run(kernel);
  ASSERT_EQ(y.size(), static_cast<std::size_t>(problem.max_rows() * c.hidden));
  const bool quantized = c.held == DataType::kFp8E4m3 && kernel == FfnKernel::kHopper;
  const Errors errors = ErrorsOf(y, problem.Reference(quantized), c.hidden);
  RecordProperty("worst_row", std::to_string(errors.worst_row));
  RecordProperty("all_rows", std::to_string(errors.all));
  EXPECT_LE(errors.worst_row, quantized ? kFp8RowLimit : kRowLimit);
  EXPECT_LE(errors.all, kLimit);
  if (quantized) {
    const Errors rounding = ErrorsOf(y, problem.Reference(false), c.hidden);
    RecordProperty("all_rows_unquantized", std::to_string(rounding.all));
    if (problem.num_rows() >= kFewRows) {
      EXPECT_LE(rounding.all, kFp8Limit);
    }
  }
  EXPECT_TRUE(std::all_of(y.begin() + problem.num_rows() * c.hidden, y.end(),
                          [](std::uint16_t bits) { return bits == 0xffff; }))
      << "a row past the last was written";
  EXPECT_EQ(problem.Run(kernel), y);
}

std::string NameOf(const testing::TestParamInfo<std::tuple<Case, FfnKernel>>& info) {
  const auto& [c, kernel] = info.param;
  return c.name + (kernel == FfnKernel::kHopper ? "Hopper" : "Portable");
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaExpertFfnTest,
                         testing::Combine(testing::ValuesIn(Cases()),
                                          testing::Values(FfnKernel::kHopper,
                                                          FfnKernel::kPortable)),
                         NameOf);

class CudaExpertFfnKernelTest : public testing::TestWithParam<DataType> {
 protected:
  void SetUp() override {
    if (!HasGpu()) GTEST_SKIP() << "no GPU on this machine";
  }
  Case CaseOf(std::vector<int> rows) const {
    return {"", 256, 128, std::move(rows), GetParam(), GetParam()};
  }
};

TEST_P(CudaExpertFfnKernelTest, CapturedGraphGivesTheSameBits) {
  Problem problem(CaseOf({70, 0, 129}));
  EXPECT_EQ(problem.Run(FfnKernel::kAuto, /*as_graph=*/true), problem.Run(FfnKernel::kAuto));
}

TEST_P(CudaExpertFfnKernelTest, NanInOneRowStaysThere) {
  Problem problem(CaseOf({70, 3, 129}));
  const std::vector<std::uint16_t> clean = problem.Run(FfnKernel::kAuto);
  constexpr std::int64_t kRow = 71;
  problem.x()[kRow * 256 + 130] = 0x7fc0;
  const std::vector<std::uint16_t> y = problem.Run(FfnKernel::kAuto);
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (i / 256 == kRow) {
      EXPECT_TRUE(std::isnan(Bf16ToFloat(y[i]))) << i;
    } else {
      ASSERT_EQ(y[i], clean[i]) << i;
    }
  }
}

TEST_P(CudaExpertFfnKernelTest, RowsResultDoesNotDependOnTheRowsBesideIt) {
  const Case many = CaseOf({129, 64});
  Problem problem(many, 1);
  const std::vector<std::uint16_t> y = problem.Run(FfnKernel::kAuto);
  for (std::int64_t i = 0; i < 128 * 256; ++i) problem.x()[i] ^= 0x8000;
  const std::vector<std::uint16_t> other = problem.Run(FfnKernel::kAuto);
  EXPECT_NE(other, y);
  EXPECT_TRUE(std::equal(y.begin() + 128 * 256, y.end(), other.begin() + 128 * 256));
}

INSTANTIATE_TEST_SUITE_P(Types, CudaExpertFfnKernelTest,
                         testing::Values(DataType::kBf16, DataType::kFp8E4m3),
                         [](const auto& info) { return std::string(DataTypeName(info.param)); });

TEST(CudaExpertFfnCreateTest, NamesItsKernel) {
  if (!HasGpu()) GTEST_SKIP() << "no GPU on this machine";
  CudaExpertFfnConfig config = {{2, 64, 32, DataType::kBf16}, 10, FfnKernel::kPortable};
  EXPECT_EQ((*CudaExpertFfn::Create(config))->kernel_name(), "portable-mma-bf16");
  config.kernel = FfnKernel::kAuto;
  if (IsHopper()) {
    EXPECT_EQ((*CudaExpertFfn::Create(config))->kernel_name(), "hopper-wgmma-bf16");
    config.shape.weights = DataType::kFp8E4m3;
    EXPECT_EQ((*CudaExpertFfn::Create(config))->kernel_name(), "hopper-wgmma-fp8");
  }
}

TEST(CudaExpertFfnCreateTest, MisalignedPointersAreRefused) {
  if (!HasGpu()) GTEST_SKIP() << "no GPU on this machine";
  Problem problem({"", 64, 32, {3}});
  auto ffn = CudaExpertFfn::Create(problem.Config(FfnKernel::kAuto));
  ASSERT_TRUE(ffn.ok()) << ffn.status();
  auto buffer = DeviceBuffer::Create(1 << 16);
  ASSERT_TRUE(buffer.ok());
  std::byte* const at = buffer->as<std::byte>();
  const auto run = [&](const std::byte* layer, void* x, void* offset, void* y) {
    return (*ffn)->Run(layer, x, static_cast<std::int32_t*>(offset), y, nullptr);
  };
  EXPECT_EQ(run(at + 16, at, at, at).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(run(at, at + 8, at, at).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(run(at, at, nullptr, at).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(run(at, at, at, at + 2).ToString(), testing::HasSubstr("y is null or misaligned"));
}

}  // namespace
}  // namespace epserve::runtime
