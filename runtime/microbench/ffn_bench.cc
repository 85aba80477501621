#include "runtime/microbench/ffn_bench.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/experts/cuda_expert_ffn.h"
#include "runtime/microbench/bench_random.h"
#include "runtime/microbench/cuda_bench_kernels.h"
#include "runtime/microbench/cuda_handles.h"
#include "runtime/microbench/ffn_baselines.h"

namespace epserve::runtime {
namespace {

// Weights of this many bytes are gone through before the first are used again: four times the L2
// cache of an H100, so that every run reads them from memory.
constexpr std::uint64_t kRotatedBytes = 4ull * 50 * 1024 * 1024;
constexpr std::uint64_t kCopyBytes = 1ull << 30;
constexpr int kBaselineIterations = 20;
constexpr int kSampledRows = 4;
// bf16: three roundings. fp8: rows and what is between the products keep three bits of mantissa;
// with uniform rows each of these costs 2.4e-2, and both factors of SwiGLU bear the first.
constexpr double kBf16ErrorLimit = 1e-2;
constexpr double kFp8ErrorLimit = 8e-2;

FfnKernel KernelOf(FfnKernelChoice choice) {
  return choice == FfnKernelChoice::kHopper     ? FfnKernel::kHopper
         : choice == FfnKernelChoice::kPortable ? FfnKernel::kPortable
                                                : FfnKernel::kAuto;
}

class FfnBench {
 public:
  explicit FfnBench(const FfnBenchParams& params)
      : params_(params),
        shape_{params.experts, params.hidden, params.intermediate, params.weights},
        offsets_(FfnExpertOffsets(params)) {
    report_.params = params;
  }

  absl::StatusOr<FfnBenchReport> Run() {
    EPS_RETURN_IF_ERROR(Open());
    EPS_RETURN_IF_ERROR(MakeLayers());
    EPS_RETURN_IF_ERROR(Verify());
    EPS_RETURN_IF_ERROR(TimeProducts());
    EPS_RETURN_IF_ERROR(TimeCopy(std::min(params_.iterations, kBaselineIterations)));
    return report_;
  }

 private:
  enum RandomStream : std::uint64_t { kRowValues = 1, kScaleValues = 2, kWeightValues = 16 };

  std::uint64_t SeedOf(std::uint64_t stream) const {
    return params_.seed * 0x632be59bd9b4e019ull + stream * 0xd1342543de82ef95ull;
  }
  std::uint64_t WeightSeed(int expert, FfnProjection projection) const {
    return SeedOf(kWeightValues + static_cast<std::uint64_t>(expert) * 3 +
                  static_cast<std::uint64_t>(projection));
  }
  bool is_fp8() const { return params_.weights == DataType::kFp8E4m3; }
  std::int64_t InputsOf(FfnProjection projection) const {
    return projection == FfnProjection::kDown ? params_.intermediate : params_.hidden;
  }
  // Keeps every product's results near 1.
  float Amplitude(FfnProjection projection) const {
    return std::sqrt(3.0f / static_cast<float>(InputsOf(projection)));
  }
  static constexpr float kRowAmplitude = 1.7f;
  static constexpr float kFp8Amplitude = 448.0f;

  absl::Status Open() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      (void)cudaGetLastError();
      return absl::UnavailableError("ffn: a GPU is needed, and this machine has none");
    }
    EPS_RETURN_IF_ERROR(stream_.Create());
    const CudaExpertFfnConfig config = {shape_, params_.rows, KernelOf(params_.kernel)};
    EPS_ASSIGN_OR_RETURN(ffn_, CudaExpertFfn::Create(config));
    report_.kernel = std::string(ffn_->kernel_name());
    report_.workspace_bytes = ffn_->workspace_bytes();
    const std::uint64_t row_elements = static_cast<std::uint64_t>(params_.rows * params_.hidden);
    EPS_ASSIGN_OR_RETURN(x_, DeviceBuffer::Create(row_elements * 2));
    EPS_ASSIGN_OR_RETURN(y_, DeviceBuffer::Create(row_elements * 2));
    EPS_ASSIGN_OR_RETURN(offset_buffer_, DeviceBuffer::Create(offsets_.size() * 4));
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpy(offset_buffer_.as<void>(), offsets_.data(),
                                        offsets_.size() * 4, cudaMemcpyHostToDevice));
    return LaunchFillRandom(
        {x_.as<void>(), DataType::kBf16, row_elements, SeedOf(kRowValues), kRowAmplitude},
        stream_.get());
  }

  // As many copies of one layer as the caches must not hold.
  absl::Status MakeLayers() {
    const std::uint64_t bytes = LayOutFfnWeights(shape_).bytes;
    const std::uint64_t used = UsedWeightBytes();
    report_.weight_bytes = used;
    const std::uint64_t layers = std::clamp<std::uint64_t>(kRotatedBytes / used + 1, 1, 16);
    EPS_ASSIGN_OR_RETURN(DeviceBuffer first, DeviceBuffer::Create(bytes));
    EPS_RETURN_IF_ERROR(FillLayer(first.as<std::byte>()));
    layers_.push_back(std::move(first));
    for (std::uint64_t i = 1; i < layers; ++i) {
      EPS_ASSIGN_OR_RETURN(DeviceBuffer copy, DeviceBuffer::Create(bytes));
      EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(copy.as<void>(), layers_[0].as<void>(), bytes,
                                               cudaMemcpyDeviceToDevice, stream_.get()));
      layers_.push_back(std::move(copy));
    }
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    return absl::OkStatus();
  }

  // Of the experts that have rows; at least one byte.
  std::uint64_t UsedWeightBytes() const {
    std::uint64_t experts = 0;
    for (int e = 0; e < params_.experts; ++e) experts += offsets_[e + 1] > offsets_[e] ? 1 : 0;
    return experts * static_cast<std::uint64_t>(3 * params_.hidden * params_.intermediate) *
           DataTypeBytes(params_.weights);
  }

  absl::Status FillLayer(std::byte* layer) {
    const std::uint64_t count = static_cast<std::uint64_t>(params_.hidden * params_.intermediate);
    const std::uint64_t blocks = static_cast<std::uint64_t>(((params_.hidden + 127) / 128) *
                                                            ((params_.intermediate + 127) / 128));
    EPS_ASSIGN_OR_RETURN(DeviceBuffer tensor,
                         DeviceBuffer::Create(count * DataTypeBytes(params_.weights)));
    EPS_ASSIGN_OR_RETURN(DeviceBuffer scales, DeviceBuffer::Create(blocks * sizeof(float)));
    for (int e = 0; e < params_.experts; ++e) {
      for (const FfnProjection p :
           {FfnProjection::kGate, FfnProjection::kUp, FfnProjection::kDown}) {
        EPS_RETURN_IF_ERROR(
            LaunchFillRandom({tensor.as<void>(), params_.weights, count, WeightSeed(e, p),
                              is_fp8() ? kFp8Amplitude : Amplitude(p)},
                             stream_.get()));
        CheckpointTensor stored = {tensor.as<void>(), params_.weights, nullptr};
        if (is_fp8()) {
          EPS_RETURN_IF_ERROR(
              LaunchFillRandom({scales.as<void>(), DataType::kFp32, blocks,
                                WeightSeed(e, p) + kScaleValues, Amplitude(p) / kFp8Amplitude},
                               stream_.get()));
          stored.scales = scales.as<float>();
        }
        EPS_RETURN_IF_ERROR(PackFfnTensor(shape_, e, p, stored, layer, stream_.get()));
      }
    }
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    return absl::OkStatus();
  }

  absl::Status Once(int iteration) {
    const auto layer = static_cast<std::size_t>(iteration) % layers_.size();
    return ffn_->Run(layers_[layer].as<std::byte>(), x_.as<void>(),
                     offset_buffer_.as<std::int32_t>(), y_.as<void>(), stream_.get());
  }

  using Work = std::function<absl::Status(int iteration)>;

  // Everything is enqueued at once, so that the host's part is not measured. Where there are
  // several, they take turns: the clocks, which follow the chip's power, are the same for all.
  absl::StatusOr<std::vector<Percentiles>> Time(int iterations, const std::vector<Work>& works) {
    std::vector<std::deque<EventPair>> events(works.size());
    for (auto& of_work : events) {
      for (int i = 0; i < iterations; ++i) EPS_RETURN_IF_ERROR(of_work.emplace_back().Create());
    }
    for (int i = -params_.warmup; i < iterations; ++i) {
      for (std::size_t w = 0; w < works.size(); ++w) {
        EventPair* pair = i < 0 ? nullptr : &events[w][static_cast<std::size_t>(i)];
        if (pair != nullptr) EPS_RETURN_IF_ERROR(pair->RecordBegin(stream_.get()));
        EPS_RETURN_IF_ERROR(works[w](params_.warmup + i));
        if (pair != nullptr) EPS_RETURN_IF_ERROR(pair->RecordEnd(stream_.get()));
      }
    }
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    std::vector<Percentiles> times;
    for (const auto& of_work : events) {
      std::vector<double> samples;
      for (const EventPair& e : of_work) {
        EPS_ASSIGN_OR_RETURN(const double us, e.ElapsedUs());
        samples.push_back(us);
      }
      times.push_back(PercentilesOf(std::move(samples)));
    }
    return times;
  }

  // The feed-forward and cuBLAS's dense products in turn; then cuBLAS's grouped ones.
  absl::Status TimeProducts() {
    EPS_ASSIGN_OR_RETURN(const auto cublas, CublasBaselines::Create(stream_.get()));
    const std::int64_t widest = std::max(2 * params_.intermediate, params_.hidden);
    EPS_ASSIGN_OR_RETURN(DeviceBuffer middle,
                         DeviceBuffer::Create(params_.rows * params_.intermediate * 2));
    EPS_ASSIGN_OR_RETURN(DeviceBuffer out, DeviceBuffer::Create(params_.rows * widest * 2));
    EPS_RETURN_IF_ERROR(LaunchFillRandom(
        {middle.as<void>(), DataType::kBf16,
         static_cast<std::uint64_t>(params_.rows * params_.intermediate), SeedOf(kRowValues), 1.0f},
        stream_.get()));
    // As wide as fp8 weights or wider: what is multiplied are random bits in every case.
    DeviceBuffer wide;
    const void* weights = layers_[0].as<void>();
    if (is_fp8()) {
      const std::int64_t count = 3 * params_.hidden * params_.intermediate;
      EPS_ASSIGN_OR_RETURN(wide, DeviceBuffer::Create(count * 2));
      EPS_RETURN_IF_ERROR(LaunchFillRandom(
          {wide.as<void>(), DataType::kBf16, static_cast<std::uint64_t>(count), SeedOf(0), 0.1f},
          stream_.get()));
      weights = wide.as<void>();
    }
    const std::uint64_t down = is_fp8() ? 0 : LayOutFfnWeights(shape_).down;
    const BenchProduct first = {x_.as<void>(), weights, out.as<void>(), 2 * params_.intermediate,
                                params_.hidden};
    const BenchProduct second = {middle.as<void>(), static_cast<const std::byte*>(weights) + down,
                                 out.as<void>(), params_.hidden, params_.intermediate};
    const Work dense = [&](int) -> absl::Status {
      EPS_RETURN_IF_ERROR(cublas->EnqueueDense(first, params_.rows));
      return cublas->EnqueueDense(second, params_.rows);
    };
    EPS_ASSIGN_OR_RETURN(const auto times,
                         Time(params_.iterations, {[this](int i) { return Once(i); }, dense}));
    report_.ffn = times[0];
    report_.dense_us = times[1].p50_us;
    if (is_fp8()) return absl::OkStatus();
    EPS_RETURN_IF_ERROR(cublas->PrepareGrouped(first, offsets_));
    EPS_RETURN_IF_ERROR(cublas->PrepareGrouped(second, offsets_));
    const Work grouped = [&](int) -> absl::Status {
      EPS_RETURN_IF_ERROR(cublas->EnqueueGrouped(0));
      return cublas->EnqueueGrouped(1);
    };
    EPS_ASSIGN_OR_RETURN(const auto grouped_times,
                         Time(std::min(params_.iterations, kBaselineIterations), {grouped}));
    report_.grouped_us = grouped_times[0].p50_us;
    return absl::OkStatus();
  }

  absl::Status TimeCopy(int iterations) {
    EPS_ASSIGN_OR_RETURN(DeviceBuffer from, DeviceBuffer::Create(kCopyBytes));
    EPS_ASSIGN_OR_RETURN(DeviceBuffer to, DeviceBuffer::Create(kCopyBytes));
    EPS_RETURN_IF_ERROR(LaunchFillRandom(
        {from.as<void>(), DataType::kBf16, kCopyBytes / 2, SeedOf(0), 1.0f}, stream_.get()));
    const Work copy = [&](int) -> absl::Status {
      EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(to.as<void>(), from.as<void>(), kCopyBytes,
                                               cudaMemcpyDeviceToDevice, stream_.get()));
      return absl::OkStatus();
    };
    EPS_ASSIGN_OR_RETURN(const auto times, Time(iterations, {copy}));
    report_.copy_gbps = 2.0 * static_cast<double>(kCopyBytes) / times[0].p50_us / 1e3;
    return absl::OkStatus();
  }

  // The sampled rows' results in fp64, from weights made again.
  absl::Status Verify() {
    EPS_CUDA_RETURN_IF_ERROR(cudaMemset(
        y_.as<void>(), 0xff, static_cast<std::size_t>(params_.rows * params_.hidden * 2)));
    EPS_RETURN_IF_ERROR(Once(0));
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    for (int i = 0; i < kSampledRows; ++i) {
      const std::int64_t row = (params_.rows - 1) * i / (kSampledRows - 1);
      EPS_ASSIGN_OR_RETURN(const double error, ErrorOf(row));
      report_.relative_error = std::max(report_.relative_error, error);
      ++report_.verified_rows;
    }
    const double limit = is_fp8() ? kFp8ErrorLimit : kBf16ErrorLimit;
    if (report_.relative_error <= limit) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("ffn: a row's relative error ", report_.relative_error, " exceeds ", limit));
  }

  // NaN counts as infinite.
  absl::StatusOr<double> ErrorOf(std::int64_t row) const {
    const auto hidden = static_cast<std::size_t>(params_.hidden);
    std::vector<std::uint16_t> packed(hidden);
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpy(packed.data(),
                                        y_.as<std::uint16_t>() + row * params_.hidden, hidden * 2,
                                        cudaMemcpyDeviceToHost));
    const int expert = static_cast<int>(std::upper_bound(offsets_.begin(), offsets_.end(), row) -
                                        offsets_.begin() - 1);
    std::vector<float> x(hidden);
    for (std::size_t i = 0; i < hidden; ++i) {
      x[i] = Bf16ToFloat(
          FloatToBf16(RandomUnit(SeedOf(kRowValues), static_cast<std::uint64_t>(row) * hidden + i) *
                      kRowAmplitude));
    }
    std::vector<float> middle = Product(expert, FfnProjection::kGate, params_.intermediate, x);
    const std::vector<float> up = Product(expert, FfnProjection::kUp, params_.intermediate, x);
    for (std::size_t i = 0; i < middle.size(); ++i) {
      middle[i] = middle[i] / (1.0f + std::exp(-middle[i])) * up[i];
    }
    const std::vector<float> y = Product(expert, FfnProjection::kDown, params_.hidden, middle);
    double error = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < hidden; ++i) {
      const double difference = Bf16ToFloat(packed[i]) - y[i];
      error += difference * difference;
      norm += static_cast<double>(y[i]) * y[i];
    }
    const double relative = std::sqrt(error / norm);
    return std::isfinite(relative) ? relative : HUGE_VAL;
  }

  std::vector<float> Product(int expert, FfnProjection projection, std::int64_t rows,
                             const std::vector<float>& with) const {
    const std::uint64_t seed = WeightSeed(expert, projection);
    const std::size_t k_blocks = (with.size() + 127) / 128;
    std::vector<float> out;
    for (std::int64_t r = 0; r < rows; ++r) {
      double sum = 0.0;
      for (std::size_t i = 0; i < with.size(); ++i) {
        const float unit = RandomUnit(seed, static_cast<std::uint64_t>(r) * with.size() + i);
        float weight = 0.0f;
        if (is_fp8()) {
          const float scale = RandomUnit(seed + kScaleValues,
                                         static_cast<std::uint64_t>(r) / 128 * k_blocks + i / 128) *
                              (Amplitude(projection) / kFp8Amplitude);
          weight = Fp8E4m3ToFloat(FloatToFp8E4m3(unit * kFp8Amplitude)) * scale;
        } else {
          weight = Bf16ToFloat(FloatToBf16(unit * Amplitude(projection)));
        }
        sum += static_cast<double>(weight) * with[i];
      }
      out.push_back(static_cast<float>(sum));
    }
    return out;
  }

  const FfnBenchParams params_;
  const CudaFfnShape shape_;
  const std::vector<std::int32_t> offsets_;
  Stream stream_;
  std::unique_ptr<CudaExpertFfn> ffn_;
  std::vector<DeviceBuffer> layers_;
  DeviceBuffer x_, y_, offset_buffer_;
  FfnBenchReport report_;
};

}  // namespace

absl::StatusOr<FfnBenchReport> RunFfnBench(const FfnBenchParams& params) {
  return FfnBench(params).Run();
}

}  // namespace epserve::runtime
