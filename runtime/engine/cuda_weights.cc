#include "runtime/engine/cuda_weights.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "runtime/base/cuda_stream.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// Enough for their reads to fill the PCIe link from the page cache, where one thread copies at a
// few GB/s; each has one tensor in flight.
constexpr int kMaxReaders = 4;

struct TensorPart {
  std::size_t layer;
  std::int64_t local_expert;
  Checkpoint::ExpertMatrix matrix;
};

constexpr std::array<std::pair<Checkpoint::ExpertMatrix, FfnProjection>, 3> kMatrices = {
    {{Checkpoint::ExpertMatrix::kGate, FfnProjection::kGate},
     {Checkpoint::ExpertMatrix::kUp, FfnProjection::kUp},
     {Checkpoint::ExpertMatrix::kDown, FfnProjection::kDown}}};

FfnProjection ProjectionOf(Checkpoint::ExpertMatrix matrix) {
  return kMatrices[static_cast<std::size_t>(matrix)].second;
}

constexpr std::uint64_t kMatrixAlignment = 256;

std::uint64_t StagingBytes(const Checkpoint::StoredMatrix& stored) {
  return (stored.bytes + kMatrixAlignment - 1) / kMatrixAlignment * kMatrixAlignment +
         stored.scale_bytes;
}

// One load, shared by its reading threads.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const CudaFfnShape& shape, std::int64_t first,
         std::span<const DeviceBuffer> layers, const LoadProgress& progress)
      : checkpoint_(checkpoint),
        shape_(shape),
        first_(first),
        layers_(layers),
        progress_(progress),
        total_bytes_(checkpoint.StoredExpertBytes(first, shape.num_local_experts)) {
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      for (std::int64_t local = 0; local < shape.num_local_experts; ++local) {
        for (const auto& [matrix, projection] : kMatrices) parts_.push_back({layer, local, matrix});
      }
    }
  }

  absl::Status Run() {
    int device = 0;
    EPS_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
    std::uint64_t staging_bytes = 0;
    for (const TensorPart& part : parts_) {
      staging_bytes = std::max(staging_bytes, StagingBytes(Describe(part)));
    }
    const int readers = static_cast<int>(std::min<std::size_t>(kMaxReaders, parts_.size()));
    std::vector<std::thread> threads;
    for (int i = 0; i < readers; ++i) {
      threads.emplace_back([this, device, staging_bytes] {
        const absl::Status status = Read(device, staging_bytes);
        const std::lock_guard lock(mutex_);
        if (status_.ok()) status_ = status;
      });
    }
    for (std::thread& thread : threads) thread.join();
    return status_;
  }

 private:
  Checkpoint::StoredMatrix Describe(const TensorPart& part) const {
    return checkpoint_.Describe(part.layer, first_ + part.local_expert, part.matrix);
  }

  // On a reading thread: takes the next tensor until there is none, or another thread has failed.
  absl::Status Read(int device, std::uint64_t staging_bytes) {
    EPS_CUDA_RETURN_IF_ERROR(cudaSetDevice(device));
    Stream stream;
    EPS_RETURN_IF_ERROR(stream.Create());
    EPS_ASSIGN_OR_RETURN(const PinnedBuffer staging, PinnedBuffer::Create(staging_bytes));
    for (std::size_t i = next_++; i < parts_.size() && !Failed(); i = next_++) {
      const absl::Status status = ReadOne(parts_[i], staging, stream.get());
      // The staging memory is the device's until the stream has run, also where a later step
      // failed.
      const absl::Status synchronised = CudaStatus(cudaStreamSynchronize(stream.get()),
                                                   "cudaStreamSynchronize", __FILE__, __LINE__);
      EPS_RETURN_IF_ERROR(status);
      EPS_RETURN_IF_ERROR(synchronised);
    }
    return absl::OkStatus();
  }

  absl::Status ReadOne(const TensorPart& part, const PinnedBuffer& staging, cudaStream_t stream) {
    const Checkpoint::StoredMatrix stored = Describe(part);
    std::byte* const data = staging.as<std::byte>();
    std::byte* const scales = data + StagingBytes({stored.dtype, stored.bytes, 0});
    EPS_RETURN_IF_ERROR(
        checkpoint_.ReadStored(part.layer, first_ + part.local_expert, part.matrix, data, scales));
    CheckpointTensor tensor;
    tensor.data = data;
    tensor.dtype = stored.dtype;
    tensor.scales = stored.scale_bytes > 0 ? reinterpret_cast<const float*>(scales) : nullptr;
    EPS_RETURN_IF_ERROR(PackFfnTensor(shape_, static_cast<int>(part.local_expert),
                                      ProjectionOf(part.matrix), tensor,
                                      layers_[part.layer].as<std::byte>(), stream));
    const std::lock_guard lock(mutex_);
    loaded_bytes_ += stored.bytes + stored.scale_bytes;
    if (progress_) progress_(loaded_bytes_, total_bytes_);
    return absl::OkStatus();
  }

  bool Failed() {
    const std::lock_guard lock(mutex_);
    return !status_.ok();
  }

  const Checkpoint& checkpoint_;
  const CudaFfnShape shape_;
  const std::int64_t first_;
  const std::span<const DeviceBuffer> layers_;
  const LoadProgress& progress_;
  const std::uint64_t total_bytes_;
  std::vector<TensorPart> parts_;
  std::atomic<std::size_t> next_ = 0;

  std::mutex mutex_;
  std::uint64_t loaded_bytes_ = 0;  // Guarded by mutex_, as the status is.
  absl::Status status_;
};

}  // namespace

DataType CudaWeights::HeldType(const Checkpoint& checkpoint) {
  const ModelInfo& info = checkpoint.info();
  for (std::size_t layer = 0; layer < info.layers.size(); ++layer) {
    for (std::int64_t expert = 0; expert < info.num_experts; ++expert) {
      for (const auto& [matrix, projection] : kMatrices) {
        if (checkpoint.Describe(layer, expert, matrix).dtype != DataType::kFp8E4m3) {
          return DataType::kBf16;
        }
      }
    }
  }
  return DataType::kFp8E4m3;
}

CudaFfnShape CudaWeights::ShapeOf(const Checkpoint& checkpoint, std::int64_t num_experts) {
  CudaFfnShape shape;
  shape.num_local_experts = static_cast<int>(num_experts);
  shape.hidden = checkpoint.info().hidden;
  shape.intermediate = checkpoint.info().intermediate;
  shape.weights = HeldType(checkpoint);
  return shape;
}

std::uint64_t CudaWeights::PlanBytes(const Checkpoint& checkpoint, std::int64_t num_experts) {
  if (num_experts == 0) return 0;
  return checkpoint.info().layers.size() * LayOutFfnWeights(ShapeOf(checkpoint, num_experts)).bytes;
}

absl::StatusOr<CudaWeights> CudaWeights::Load(const Checkpoint& checkpoint, std::int64_t first,
                                              std::int64_t num, const LoadProgress& progress) {
  CudaWeights weights;
  if (progress) progress(0, checkpoint.StoredExpertBytes(first, num));
  if (num == 0) return weights;
  const CudaFfnShape shape = ShapeOf(checkpoint, num);
  for (std::size_t layer = 0; layer < checkpoint.info().layers.size(); ++layer) {
    EPS_ASSIGN_OR_RETURN(DeviceBuffer block, DeviceBuffer::Create(LayOutFfnWeights(shape).bytes));
    weights.layers_.push_back(std::move(block));
  }
  // The blocks have been zeroed on the default stream, which the loader's are not ordered with.
  EPS_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
  EPS_RETURN_IF_ERROR(Loader(checkpoint, shape, first, weights.layers_, progress).Run());
  return weights;
}

}  // namespace epserve::runtime
