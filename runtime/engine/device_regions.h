// Memory on GPUs that other processes share with this one: what a device engine opens, and what a
// shard's rows may lie in.
#ifndef EPSERVE_RUNTIME_ENGINE_DEVICE_REGIONS_H_
#define EPSERVE_RUNTIME_ENGINE_DEVICE_REGIONS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace epserve::runtime {

// Mapped for as long as this lives, on every GPU that the process uses. Not for the host's reach.
class DeviceRegion {
 public:
  virtual ~DeviceRegion() = default;
  virtual std::byte* data() const = 0;
};

struct DeviceRegionSpec {
  std::string handle;          // cudaIpcMemHandle_t
  std::int64_t device_id = 0;  // among the GPUs that the other process sees
  std::uint64_t size_bytes = 0;
};

// Thread-safe. Opening, and a region's end, may wait for the device: no kernel may be waiting for a
// peer meanwhile.
class DeviceRegions {
 public:
  virtual ~DeviceRegions() = default;
  // FAILED_PRECONDITION: this process sees no such GPU, or the handle leads to nothing here.
  // INVALID_ARGUMENT: the allocation is smaller.
  virtual absl::StatusOr<std::shared_ptr<const DeviceRegion>> Open(
      const DeviceRegionSpec& spec) = 0;
};

// Rows of a shard, one after another, in device memory, or going there; null: with the shard's
// other rows. Hidden states and outputs that are 16-byte aligned and the whole shard are used in
// place; others are copied, on the device.
struct ShardDeviceRows {
  std::int64_t first_row = 0;  // among the shard's
  std::int64_t num_rows = 0;
  const std::byte* hidden = nullptr;  // [num_rows, H] dtype
  std::byte* output = nullptr;        // [num_rows, H] dtype; may be `hidden`
  // Both or none; of all rows of a shard or of none. Nobody has looked at them yet.
  const std::byte* topk_ids = nullptr;      // [num_rows, K] i32, or i64 where wide_ids
  const std::byte* topk_weights = nullptr;  // [num_rows, K] f32
  bool wide_ids = false;
};

// Pieces of a shard with routing in device memory: each takes a launch of its own.
inline constexpr std::size_t kMaxRoutedPieces = 16;

// Routing in device memory that is wrong. The rows of its piece were served as if they named no
// expert.
struct RoutingFault {
  std::size_t piece = 0;    // index among the shard's device rows
  std::int64_t entry = 0;   // the first that is wrong, among the piece's [num_rows, K]
  bool in_weights = false;  // else in the ids
  std::int64_t id = 0;      // outside [-1, E)
  float weight = 0.0F;      // not finite
};

// How many of the shard's rows have their hidden states, or their output, in device memory.
inline std::int64_t NumHiddenIn(std::span<const ShardDeviceRows> rows) {
  std::int64_t count = 0;
  for (const ShardDeviceRows& piece : rows) count += piece.hidden != nullptr ? piece.num_rows : 0;
  return count;
}
inline std::int64_t NumOutputIn(std::span<const ShardDeviceRows> rows) {
  std::int64_t count = 0;
  for (const ShardDeviceRows& piece : rows) count += piece.output != nullptr ? piece.num_rows : 0;
  return count;
}

inline std::int64_t NumRoutedIn(std::span<const ShardDeviceRows> rows) {
  std::int64_t count = 0;
  for (const ShardDeviceRows& piece : rows) count += piece.topk_ids != nullptr ? piece.num_rows : 0;
  return count;
}

struct DeviceRead {
  const std::byte* source = nullptr;  // of the device
  void* destination = nullptr;        // of the host
  std::size_t bytes = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_DEVICE_REGIONS_H_
