// CUDA memory of other processes, opened by its IPC handle. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_REGIONS_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_REGIONS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/engine/device_regions.h"

namespace epserve::runtime {

class CudaRegions final : public DeviceRegions {
 public:
  // `device`: the GPU that uses the regions, wherever they lie.
  explicit CudaRegions(int device) : device_(device) {}

  absl::StatusOr<std::shared_ptr<const DeviceRegion>> Open(const DeviceRegionSpec& spec) override;

 private:
  const int device_;
};

// The place of all rows of a shard, where it is one piece that kernels can use; else null.
const std::byte* WholeHidden(std::span<const ShardDeviceRows> rows, std::int64_t num_tokens);
std::byte* WholeOutput(std::span<const ShardDeviceRows> rows, std::int64_t num_tokens);

// Enqueue, and return before they run: each piece to its rows of [gathered, + the shard's), or from
// there to its place.
absl::Status GatherHidden(std::span<const ShardDeviceRows> rows, std::size_t row_bytes,
                          std::byte* gathered, cudaStream_t stream);
absl::Status ScatterOutput(std::span<const ShardDeviceRows> rows, std::size_t row_bytes,
                           const std::byte* gathered, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_REGIONS_H_
