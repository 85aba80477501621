// A HuggingFace checkpoint directory as a source of expert weights: config.json, then
// model.safetensors or the shards of its index. Opening checks the presence, type and shape of
// every expert tensor of every layer from the headers, and reads no weights but the few bytes that
// ModelInfo::fingerprint is made of; loading reads only the bytes of the experts asked for, in
// bounded pieces, and converts them to fp32, the type that the host backend holds weights in. Other
// backends read them in the files' own types.
//
// fp32 because the GEMM of the machines the host backend runs on is fp32, and because holding BF16
// would widen the weights again on every batch; it costs twice the memory of a BF16 checkpoint.
//
// Shared experts are not read: they stay with the caller. Immutable once open, so thread-safe.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_CHECKPOINT_H_
#define EPSERVE_RUNTIME_CHECKPOINT_CHECKPOINT_H_

#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/dtype.h"
#include "runtime/checkpoint/input_file.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/model_info.h"

namespace epserve::runtime {

// 64-byte aligned floats, not initialised, so that memory becomes resident as it is filled.
class FloatBuffer {
 public:
  FloatBuffer() = default;
  // RESOURCE_EXHAUSTED, naming `what`, where the memory is not there.
  static absl::StatusOr<FloatBuffer> Create(std::uint64_t count, std::string_view what);

  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  std::uint64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float[], Free> data_;
  std::uint64_t size_ = 0;
};

// Of one layer. The layout that LayerWeights (runtime/experts/expert_ffn.h) asks for.
struct LayerExperts {
  FloatBuffer gate_up;  // [E_local, 2 * I, H]: gate rows, then up rows
  FloatBuffer down;     // [E_local, H, I]
};

// The same range of experts of every layer, in the order of ModelInfo::layers.
struct ExpertWeights {
  std::int64_t first_expert = 0;
  std::int64_t num_experts = 0;
  std::vector<LayerExperts> layers;
};

struct RouterWeights {
  FloatBuffer gate;  // [E, H]
  FloatBuffer bias;  // [E]; empty where the architecture has none
};

// Bytes read so far and in all, as they lie in the files.
using LoadProgress = std::function<void(std::uint64_t loaded, std::uint64_t total)>;

class Checkpoint {
 public:
  // NOT_FOUND: the directory, a file or a tensor is missing. INVALID_ARGUMENT: config.json or a
  // tensor's type or shape says something that cannot be served. DATA_LOSS: a file is damaged. A
  // file that is there and cannot be opened: as of InputFile::Open.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& directory);

  const ModelConfig& config() const { return config_; }
  const ModelInfo& info() const { return info_; }

  // Reads the experts [first, first + num) of every layer. `progress` may be empty. DATA_LOSS: a
  // file has changed, or a weight is NaN or Inf; names file, tensor and place.
  // REQUIRES: 0 <= first, 0 <= num, first + num <= E.
  absl::StatusOr<ExpertWeights> LoadExpertRange(std::int64_t first, std::int64_t num,
                                                const LoadProgress& progress) const;

  // One expert of one layer, as LoadExpertRange has it.
  // REQUIRES: 0 <= expert < E; `layer_index` indexes ModelInfo::layers.
  absl::StatusOr<LayerExperts> LoadExpert(std::size_t layer_index, std::int64_t expert) const;

  // A matrix of one expert as it lies in the files, for backends that hold it in its own type.
  enum class ExpertMatrix : int { kGate, kUp, kDown };  // [I, H], [I, H], [H, I]
  struct StoredMatrix {
    DataType dtype = DataType::kFp32;  // kFp32, kFp16, kBf16, kFp8E4m3
    std::uint64_t bytes = 0;
    std::uint64_t scale_bytes = 0;  // kFp8E4m3 alone: f32 [ceil(rows / 128), ceil(cols / 128)]
  };
  // REQUIRES, of both: as LoadExpert.
  StoredMatrix Describe(std::size_t layer_index, std::int64_t expert, ExpertMatrix matrix) const;
  // Reads it to `data` [bytes] and `scales` [scale_bytes]. DATA_LOSS names file and tensor, and
  // where a weight is NaN or Inf its place.
  absl::Status ReadStored(std::size_t layer_index, std::int64_t expert, ExpertMatrix matrix,
                          void* data, void* scales) const;

  // REQUIRES: info().has_router; `layer_index` indexes ModelInfo::layers.
  absl::StatusOr<RouterWeights> LoadRouter(std::size_t layer_index) const;

  // Bytes that the experts [first, first + num) of every layer take in the files.
  std::uint64_t StoredExpertBytes(std::int64_t first, std::int64_t num) const;
  // What LoadExpertRange of `num` experts and all routers hold in memory.
  std::uint64_t HeldExpertBytes(std::int64_t num) const;
  std::uint64_t HeldRouterBytes() const;

 private:
  // Where a weight lies; its shape follows from its place.
  struct Stored {
    std::uint64_t offset = 0;
    std::int32_t file = -1;  // -1: there is none
    DataType dtype = DataType::kFp32;
  };
  struct Matrix {
    Stored weight;
    Stored scale;  // FP8 alone: fp32 [ceil(rows / 128), ceil(cols / 128)]
  };
  enum Projection : int { kGate, kUp, kDown };
  struct Expert {
    std::array<Matrix, 3> matrices;  // by Projection
  };
  struct Router {
    Stored gate;
    Stored bias;
  };
  class Builder;  // fills a Checkpoint from a TensorTable
  class Loader;   // reads and converts, counting its progress

  Checkpoint() = default;
  absl::StatusOr<LayerExperts> LoadLayer(Loader& loader, std::size_t layer_index,
                                         std::int64_t first, std::int64_t num) const;
  // Elements [first, first + count) of a tensor whose rows have `cols`; each must be finite.
  absl::Status ReadElements(const Stored& stored, const std::string& name, std::int64_t cols,
                            std::uint64_t first, std::uint64_t count, void* out) const;
  const Expert& ExpertAt(std::size_t layer_index, std::int64_t expert) const {
    return experts_[layer_index * static_cast<std::size_t>(config_.num_experts) +
                    static_cast<std::size_t>(expert)];
  }
  std::int64_t Rows(Projection projection) const;
  std::int64_t Cols(Projection projection) const;
  std::string ExpertName(std::size_t layer_index, std::int64_t expert, Projection projection) const;
  std::string GateName(std::size_t layer_index) const;
  std::string BiasName(std::size_t layer_index) const;

  ModelConfig config_;
  ModelInfo info_;
  std::vector<InputFile> files_;
  std::vector<Expert> experts_;  // [layers, E]
  std::vector<Router> routers_;  // [layers], empty where there is no router
};

// Opens the checkpoint, checks it, and keeps nothing of it but its description.
absl::StatusOr<ModelInfo> ReadModelInfo(const std::string& directory);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_CHECKPOINT_H_
