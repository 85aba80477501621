// The local experts' weights of every layer in device memory, read from the checkpoint in its own
// types: several threads read tensors into pinned memory, from where the device takes them, so that
// reading, copying and packing overlap. Internal to this folder.
// Thread safety: immutable once loaded.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_WEIGHTS_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/experts/cuda_ffn_weights.h"

namespace epserve::runtime {

class CudaWeights {
 public:
  // fp8 where every expert tensor of the checkpoint is, else bf16.
  static DataType HeldType(const Checkpoint& checkpoint);
  static CudaFfnShape ShapeOf(const Checkpoint& checkpoint, std::int64_t num_experts);
  // Of the device, for `num_experts` experts of every layer.
  static std::uint64_t PlanBytes(const Checkpoint& checkpoint, std::int64_t num_experts);

  // Onto the current device, reading no bytes but those of the experts [first, first + num).
  // `progress` may be empty; it is called by one thread at a time.
  static absl::StatusOr<CudaWeights> Load(const Checkpoint& checkpoint, std::int64_t first,
                                          std::int64_t num, const LoadProgress& progress);

  CudaWeights() = default;
  // A block as LayOutFfnWeights has it. REQUIRES: at least one expert.
  const std::byte* layer(std::size_t layer_index) const {
    return layers_[layer_index].as<std::byte>();
  }

 private:
  std::vector<DeviceBuffer> layers_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_WEIGHTS_H_
