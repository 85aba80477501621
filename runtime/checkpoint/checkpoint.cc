#include "runtime/checkpoint/checkpoint.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "runtime/base/digest.h"
#include "runtime/base/status.h"
#include "runtime/checkpoint/finite_read.h"
#include "runtime/checkpoint/tensor_table.h"

namespace epserve::runtime {
namespace {

constexpr std::string_view kConfigFile = "config.json";
constexpr std::uint64_t kMaxConfigBytes = 1 << 20;  // Published ones have a few KiB.
constexpr std::size_t kFloatAlignment = 64;

// How much of the weights goes into the fingerprint. Fine-tuning moves nearly every weight, so a
// few of each tensor tell; models of more expert tensors are sampled at even distances.
constexpr std::uint64_t kSampleBytes = 64;
constexpr std::size_t kMaxSampledExpertTensors = 4096;

std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::string ScaleName(const std::string& weight) { return absl::StrCat(weight, "_scale_inv"); }

}  // namespace

absl::StatusOr<FloatBuffer> FloatBuffer::Create(std::uint64_t count, std::string_view what) {
  FloatBuffer buffer;
  if (count == 0) return buffer;
  const std::uint64_t bytes =
      (count * sizeof(float) + kFloatAlignment - 1) / kFloatAlignment * kFloatAlignment;
  auto* data = static_cast<float*>(std::aligned_alloc(kFloatAlignment, bytes));
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("checkpoint: ", std::string(what), ": ", bytes,
                                                     " bytes of memory are not to be had"));
  }
  buffer.data_.reset(data);
  buffer.size_ = count;
  return buffer;
}

// Looks every tensor up by its name and checks it against what config.json makes of it.
class Checkpoint::Builder {
 public:
  Builder(const TensorTable& table, Checkpoint* checkpoint) : table_(table), out_(*checkpoint) {}

  absl::Status Build() {
    const ModelConfig& config = out_.config_;
    fingerprint_.AddText(ArchitectureName(config.architecture));
    fingerprint_.AddText(absl::StrCat(config.hidden, " ", config.intermediate, " ",
                                      config.num_experts, " ", config.topk, " ",
                                      absl::StrJoin(config.layers, ",")));
    const RouterConfig& router = config.router;
    fingerprint_.AddText(absl::StrCat(static_cast<int>(router.kind), " ", router.renormalise, " ",
                                      router.num_groups, " ", router.topk_groups, " ",
                                      router.scaling_factor));
    for (std::size_t layer = 0; layer < config.layers.size(); ++layer) {
      for (std::int64_t e = 0; e < config.num_experts; ++e) {
        Expert expert;
        for (const Projection projection : {kGate, kUp, kDown}) {
          EPS_ASSIGN_OR_RETURN(expert.matrices[projection], FindMatrix(layer, e, projection));
        }
        out_.experts_.push_back(expert);
      }
    }
    EPS_RETURN_IF_ERROR(FindRouters());
    EPS_RETURN_IF_ERROR(SampleContent());
    out_.info_ = {.fingerprint = absl::StrFormat("%016x", fingerprint_.value()),
                  .architecture = std::string(ArchitectureName(config.architecture)),
                  .hidden = config.hidden,
                  .intermediate = config.intermediate,
                  .num_experts = config.num_experts,
                  .topk = config.topk,
                  .layers = config.layers,
                  .has_router = !out_.routers_.empty()};
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<Matrix> FindMatrix(std::size_t layer, std::int64_t expert, Projection projection) {
    const std::string name = out_.ExpertName(layer, expert, projection);
    const std::int64_t rows = out_.Rows(projection);
    const std::int64_t cols = out_.Cols(projection);
    Matrix matrix;
    EPS_ASSIGN_OR_RETURN(matrix.weight, Find(name, {rows, cols}));
    if (matrix.weight.dtype != DataType::kFp8E4m3) return matrix;
    if (!out_.config_.has_fp8_blocks) {
      return absl::InvalidArgumentError(
          absl::StrCat("checkpoint: ", FileOf(name), ": tensor \"", name,
                       "\" is F8_E4M3, but config.json has no quantization_config"));
    }
    const std::string scale = ScaleName(name);
    EPS_ASSIGN_OR_RETURN(matrix.scale,
                         Find(scale, {CeilDiv(rows, kFp8BlockSize), CeilDiv(cols, kFp8BlockSize)}));
    if (matrix.scale.dtype != DataType::kFp32) {
      return absl::InvalidArgumentError(absl::StrCat("checkpoint: ", FileOf(scale), ": tensor \"",
                                                     scale, "\" is not F32, as scales must be"));
    }
    return matrix;
  }

  // The router is there for every layer or for none.
  absl::Status FindRouters() {
    const std::size_t num_layers = out_.config_.layers.size();
    const bool any = [&] {
      for (std::size_t layer = 0; layer < num_layers; ++layer) {
        if (table_.Find(out_.GateName(layer)) != nullptr) return true;
      }
      return false;
    }();
    if (!any) return absl::OkStatus();
    const std::int64_t num_experts = out_.config_.num_experts;
    for (std::size_t layer = 0; layer < num_layers; ++layer) {
      Router router;
      EPS_ASSIGN_OR_RETURN(router.gate,
                           FindWide(out_.GateName(layer), {num_experts, out_.config_.hidden}));
      if (out_.config_.architecture == Architecture::kDeepseekV3) {
        EPS_ASSIGN_OR_RETURN(router.bias, FindWide(out_.BiasName(layer), {num_experts}));
      }
      out_.routers_.push_back(router);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Stored> FindWide(const std::string& name, const std::vector<std::int64_t>& shape) {
    EPS_ASSIGN_OR_RETURN(const Stored stored, Find(name, shape));
    if (stored.dtype == DataType::kFp8E4m3) {
      return absl::InvalidArgumentError(absl::StrCat("checkpoint: ", FileOf(name), ": tensor \"",
                                                     name, "\" is F8_E4M3; a router is not"));
    }
    return stored;
  }

  absl::StatusOr<Stored> Find(const std::string& name, const std::vector<std::int64_t>& shape) {
    const TensorTable::Tensor* tensor = table_.Find(name);
    if (tensor == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("checkpoint: ", table_.source(), ": tensor \"", name, "\" is missing"));
    }
    const TensorEntry& entry = tensor->entry;
    const std::optional<DataType> dtype = WeightType(entry.dtype);
    if (!dtype.has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("checkpoint: ", FileOf(name), ": tensor \"",
                                                     name, "\" is ", entry.dtype,
                                                     "; supported are BF16, F16, F32 and F8_E4M3"));
    }
    if (entry.shape != shape) {
      return absl::InvalidArgumentError(
          absl::StrCat("checkpoint: ", FileOf(name), ": tensor \"", name, "\" has shape [",
                       absl::StrJoin(entry.shape, ", "), "]; config.json makes it [",
                       absl::StrJoin(shape, ", "), "]"));
    }
    fingerprint_.AddText(name);
    fingerprint_.AddText(absl::StrCat(entry.dtype, " ", entry.bytes));
    return Stored{entry.offset, tensor->file, *dtype};
  }

  // Adds the first bytes of tensors, in the order of layers and experts, so that how they are
  // spread over files makes no difference.
  absl::Status SampleContent() {
    const std::size_t num_tensors = 3 * out_.experts_.size();
    const std::size_t num_samples = std::min(num_tensors, kMaxSampledExpertTensors);
    const auto num_experts = static_cast<std::size_t>(out_.config_.num_experts);
    for (std::size_t sample = 0; sample < num_samples; ++sample) {
      const std::size_t tensor = sample * num_tensors / num_samples;
      const std::size_t expert = tensor / 3;
      const auto projection = static_cast<Projection>(tensor % 3);
      EPS_RETURN_IF_ERROR(AddSample(out_.ExpertName(
          expert / num_experts, static_cast<std::int64_t>(expert % num_experts), projection)));
    }
    for (std::size_t layer = 0; layer < out_.routers_.size(); ++layer) {
      EPS_RETURN_IF_ERROR(AddSample(out_.GateName(layer)));
      if (out_.routers_[layer].bias.file < 0) continue;
      EPS_RETURN_IF_ERROR(AddSample(out_.BiasName(layer)));
    }
    return absl::OkStatus();
  }

  // REQUIRES: Find has found `name`.
  absl::Status AddSample(const std::string& name) {
    const TensorTable::Tensor& tensor = *table_.Find(name);
    std::array<char, kSampleBytes> sample;
    const std::uint64_t bytes = std::min(tensor.entry.bytes, kSampleBytes);
    const InputFile& file = table_.files()[static_cast<std::size_t>(tensor.file)];
    const absl::Status read = file.ReadAt(tensor.entry.offset, sample.data(), bytes);
    if (!read.ok()) {
      return absl::Status(read.code(),
                          absl::StrCat(std::string(read.message()), " (tensor \"", name, "\")"));
    }
    // No text, but its length follows from one that is.
    fingerprint_.AddText(std::string_view(sample.data(), bytes));
    return absl::OkStatus();
  }

  std::string FileOf(const std::string& name) const {
    const TensorTable::Tensor* tensor = table_.Find(name);
    return tensor == nullptr ? table_.source()
                             : table_.files()[static_cast<std::size_t>(tensor->file)].name();
  }

  const TensorTable& table_;
  Checkpoint& out_;
  Digest fingerprint_;
};

// Reads matrices piece by piece; one Loader serves one load.
class Checkpoint::Loader {
 public:
  Loader(const Checkpoint& checkpoint, std::uint64_t total_bytes, const LoadProgress& progress)
      : checkpoint_(checkpoint), total_bytes_(total_bytes), progress_(progress) {}

  // Reads [rows, cols] as fp32 to `out`. `name` is the tensor's, for errors.
  absl::Status Read(const Matrix& matrix, const std::string& name, std::int64_t rows,
                    std::int64_t cols, float* out) {
    const std::int64_t scale_cols = CeilDiv(cols, kFp8BlockSize);
    const bool scaled = matrix.weight.dtype == DataType::kFp8E4m3;
    if (scaled) {
      scales_.resize(static_cast<std::size_t>(CeilDiv(rows, kFp8BlockSize) * scale_cols));
      EPS_RETURN_IF_ERROR(
          Take(matrix.scale, ScaleName(name), scale_cols, 0, scales_.size(), scales_.data()));
    }
    const std::uint64_t row_bytes =
        static_cast<std::uint64_t>(cols) * DataTypeBytes(matrix.weight.dtype);
    const auto rows_per_piece =
        static_cast<std::int64_t>(std::max<std::uint64_t>(1, kPieceBytes / row_bytes));
    piece_.resize(std::max<std::size_t>(
        piece_.size(), static_cast<std::size_t>(std::min(rows, rows_per_piece)) * row_bytes));
    for (std::int64_t row = 0; row < rows; row += rows_per_piece) {
      const std::int64_t count = std::min(rows_per_piece, rows - row);
      EPS_RETURN_IF_ERROR(Take(matrix.weight, name, cols, static_cast<std::uint64_t>(row * cols),
                               static_cast<std::uint64_t>(count * cols), piece_.data()));
      float* place = out + row * cols;
      ConvertToFloat(matrix.weight.dtype, piece_.data(), place,
                     static_cast<std::size_t>(count * cols));
      for (std::int64_t r = row; scaled && r < row + count; ++r) {
        ScaleRow(scales_.data() + r / kFp8BlockSize * scale_cols, cols, out + r * cols);
      }
    }
    return absl::OkStatus();
  }

 private:
  // Large enough to stream from disk, small beside any weights.
  static constexpr std::uint64_t kPieceBytes = 1 << 20;

  static void ScaleRow(const float* scales, std::int64_t cols, float* row) {
    for (std::int64_t c = 0; c < cols; ++c) row[c] *= scales[c / kFp8BlockSize];
  }

  absl::Status Take(const Stored& stored, const std::string& name, std::int64_t cols,
                    std::uint64_t first, std::uint64_t count, void* out) {
    EPS_RETURN_IF_ERROR(checkpoint_.ReadElements(stored, name, cols, first, count, out));
    loaded_bytes_ += count * DataTypeBytes(stored.dtype);
    if (progress_) progress_(loaded_bytes_, total_bytes_);
    return absl::OkStatus();
  }

  const Checkpoint& checkpoint_;
  const std::uint64_t total_bytes_;
  const LoadProgress& progress_;
  std::uint64_t loaded_bytes_ = 0;
  std::vector<float> scales_;
  std::vector<char> piece_;
};

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& directory) {
  EPS_ASSIGN_OR_RETURN(const InputFile config_file, InputFile::Open(directory, kConfigFile));
  EPS_ASSIGN_OR_RETURN(const std::string text, config_file.ReadAll(kMaxConfigBytes));
  auto checkpoint = std::unique_ptr<Checkpoint>(new Checkpoint);
  EPS_ASSIGN_OR_RETURN(
      checkpoint->config_,
      ParseModelConfig(text, absl::StrCat(directory, "/", std::string(kConfigFile))));
  EPS_ASSIGN_OR_RETURN(TensorTable table, TensorTable::Open(directory));
  EPS_RETURN_IF_ERROR(Builder(table, checkpoint.get()).Build());
  checkpoint->files_ = std::move(table).TakeFiles();
  return checkpoint;
}

std::int64_t Checkpoint::Rows(Projection projection) const {
  return projection == kDown ? config_.hidden : config_.intermediate;
}

std::int64_t Checkpoint::Cols(Projection projection) const {
  return projection == kDown ? config_.intermediate : config_.hidden;
}

std::string Checkpoint::ExpertName(std::size_t layer_index, std::int64_t expert,
                                   Projection projection) const {
  const std::int64_t layer = config_.layers[layer_index];
  if (config_.architecture == Architecture::kMixtral) {
    static constexpr std::array<const char*, 3> kNames = {"w1", "w3", "w2"};
    return absl::StrCat("model.layers.", layer, ".block_sparse_moe.experts.", expert, ".",
                        kNames[projection], ".weight");
  }
  static constexpr std::array<const char*, 3> kNames = {"gate_proj", "up_proj", "down_proj"};
  return absl::StrCat("model.layers.", layer, ".mlp.experts.", expert, ".", kNames[projection],
                      ".weight");
}

std::string Checkpoint::GateName(std::size_t layer_index) const {
  const bool mixtral = config_.architecture == Architecture::kMixtral;
  return absl::StrCat("model.layers.", config_.layers[layer_index],
                      mixtral ? ".block_sparse_moe" : ".mlp", ".gate.weight");
}

std::string Checkpoint::BiasName(std::size_t layer_index) const {
  return absl::StrCat("model.layers.", config_.layers[layer_index],
                      ".mlp.gate.e_score_correction_bias");
}

absl::Status Checkpoint::ReadElements(const Stored& stored, const std::string& name,
                                      std::int64_t cols, std::uint64_t first, std::uint64_t count,
                                      void* out) const {
  const InputFile& file = files_[static_cast<std::size_t>(stored.file)];
  return ReadFinite({file, name, stored.offset, stored.dtype, cols}, first, count, out);
}

absl::StatusOr<LayerExperts> Checkpoint::LoadLayer(Loader& loader, std::size_t layer_index,
                                                   std::int64_t first, std::int64_t num) const {
  const auto matrix_size = static_cast<std::uint64_t>(config_.hidden * config_.intermediate);
  const auto count = static_cast<std::uint64_t>(num);
  LayerExperts experts;
  EPS_ASSIGN_OR_RETURN(experts.gate_up,
                       FloatBuffer::Create(count * 2 * matrix_size, "expert weights"));
  EPS_ASSIGN_OR_RETURN(experts.down, FloatBuffer::Create(count * matrix_size, "expert weights"));
  for (std::int64_t e = 0; e < num; ++e) {
    const auto local = static_cast<std::uint64_t>(e);
    float* const gate = experts.gate_up.data() + 2 * local * matrix_size;
    const std::array<float*, 3> places = {gate, gate + matrix_size,
                                          experts.down.data() + local * matrix_size};
    for (const Projection projection : {kGate, kUp, kDown}) {
      EPS_RETURN_IF_ERROR(loader.Read(ExpertAt(layer_index, first + e).matrices[projection],
                                      ExpertName(layer_index, first + e, projection),
                                      Rows(projection), Cols(projection), places[projection]));
    }
  }
  return experts;
}

absl::StatusOr<ExpertWeights> Checkpoint::LoadExpertRange(std::int64_t first, std::int64_t num,
                                                          const LoadProgress& progress) const {
  const std::uint64_t total_bytes = StoredExpertBytes(first, num);
  Loader loader(*this, total_bytes, progress);
  ExpertWeights weights{.first_expert = first, .num_experts = num, .layers = {}};
  if (progress) progress(0, total_bytes);
  for (std::size_t layer = 0; layer < config_.layers.size(); ++layer) {
    EPS_ASSIGN_OR_RETURN(LayerExperts experts, LoadLayer(loader, layer, first, num));
    weights.layers.push_back(std::move(experts));
  }
  return weights;
}

absl::StatusOr<LayerExperts> Checkpoint::LoadExpert(std::size_t layer_index,
                                                    std::int64_t expert) const {
  const LoadProgress no_progress;
  Loader loader(*this, 0, no_progress);
  return LoadLayer(loader, layer_index, expert, 1);
}

Checkpoint::StoredMatrix Checkpoint::Describe(std::size_t layer_index, std::int64_t expert,
                                              ExpertMatrix matrix) const {
  const auto projection = static_cast<Projection>(matrix);
  const Matrix& found = ExpertAt(layer_index, expert).matrices[projection];
  StoredMatrix stored;
  stored.dtype = found.weight.dtype;
  stored.bytes = static_cast<std::uint64_t>(config_.hidden * config_.intermediate) *
                 DataTypeBytes(stored.dtype);
  if (found.scale.file >= 0) {
    stored.scale_bytes =
        sizeof(float) * static_cast<std::uint64_t>(CeilDiv(Rows(projection), kFp8BlockSize) *
                                                   CeilDiv(Cols(projection), kFp8BlockSize));
  }
  return stored;
}

absl::Status Checkpoint::ReadStored(std::size_t layer_index, std::int64_t expert,
                                    ExpertMatrix matrix, void* data, void* scales) const {
  const auto projection = static_cast<Projection>(matrix);
  const Matrix& found = ExpertAt(layer_index, expert).matrices[projection];
  const StoredMatrix stored = Describe(layer_index, expert, matrix);
  const std::string name = ExpertName(layer_index, expert, projection);
  const std::int64_t cols = Cols(projection);
  EPS_RETURN_IF_ERROR(
      ReadElements(found.weight, name, cols, 0, stored.bytes / DataTypeBytes(stored.dtype), data));
  if (stored.scale_bytes == 0) return absl::OkStatus();
  return ReadElements(found.scale, ScaleName(name), CeilDiv(cols, kFp8BlockSize), 0,
                      stored.scale_bytes / sizeof(float), scales);
}

std::uint64_t Checkpoint::StoredExpertBytes(std::int64_t first, std::int64_t num) const {
  std::uint64_t bytes = 0;
  for (std::size_t layer = 0; layer < config_.layers.size(); ++layer) {
    for (std::int64_t expert = first; expert < first + num; ++expert) {
      for (const ExpertMatrix matrix :
           {ExpertMatrix::kGate, ExpertMatrix::kUp, ExpertMatrix::kDown}) {
        const StoredMatrix stored = Describe(layer, expert, matrix);
        bytes += stored.bytes + stored.scale_bytes;
      }
    }
  }
  return bytes;
}

absl::StatusOr<RouterWeights> Checkpoint::LoadRouter(std::size_t layer_index) const {
  const Router& router = routers_[layer_index];
  const std::int64_t num_experts = config_.num_experts;
  const LoadProgress no_progress;
  Loader loader(*this, 0, no_progress);
  RouterWeights weights;
  EPS_ASSIGN_OR_RETURN(
      weights.gate,
      FloatBuffer::Create(static_cast<std::uint64_t>(num_experts * config_.hidden), "router"));
  EPS_RETURN_IF_ERROR(loader.Read({.weight = router.gate}, GateName(layer_index), num_experts,
                                  config_.hidden, weights.gate.data()));
  if (router.bias.file < 0) return weights;
  EPS_ASSIGN_OR_RETURN(weights.bias,
                       FloatBuffer::Create(static_cast<std::uint64_t>(num_experts), "router bias"));
  EPS_RETURN_IF_ERROR(loader.Read({.weight = router.bias}, BiasName(layer_index), 1, num_experts,
                                  weights.bias.data()));
  return weights;
}

std::uint64_t Checkpoint::HeldExpertBytes(std::int64_t num) const {
  return config_.layers.size() * sizeof(float) * 3 *
         static_cast<std::uint64_t>(num * config_.hidden * config_.intermediate);
}

std::uint64_t Checkpoint::HeldRouterBytes() const {
  const bool biased = config_.architecture == Architecture::kDeepseekV3;
  return routers_.size() * sizeof(float) *
         static_cast<std::uint64_t>(config_.num_experts * (config_.hidden + (biased ? 1 : 0)));
}

absl::StatusOr<ModelInfo> ReadModelInfo(const std::string& directory) {
  EPS_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(directory));
  return checkpoint->info();
}

}  // namespace epserve::runtime
