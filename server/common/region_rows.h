// Rows of a shard in the shared memory of clients, as both sides of the workers' stream have them.
#ifndef EPSERVE_SERVER_COMMON_REGION_ROWS_H_
#define EPSERVE_SERVER_COMMON_REGION_ROWS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace epserve::server {

struct RegionRows {
  std::uint64_t region = 0;
  std::string label;
  std::uint64_t object_offset = 0;
  std::int64_t first_row = 0;  // among the shard's
  std::int64_t num_rows = 0;
};

inline std::int64_t NumRowsIn(const std::vector<RegionRows>& parts) {
  std::int64_t count = 0;
  for (const RegionRows& part : parts) count += part.num_rows;
  return count;
}

// CUDA memory of a client.
struct DeviceRegionInfo {
  std::uint64_t region = 0;  // its number
  std::string label;
  std::string handle;  // cudaIpcMemHandle_t
  std::int64_t device_id = 0;
  std::uint64_t size_bytes = 0;
};

struct DevicePlace {
  std::uint64_t region = 0;
  std::uint64_t offset_bytes = 0;
};

// Rows of a shard in device regions; what of them lies there has a place.
struct DeviceRows {
  std::int64_t first_row = 0;  // among the shard's
  std::int64_t num_rows = 0;
  std::int64_t request_row = 0;  // of the first among its request's
  std::optional<DevicePlace> hidden;
  std::optional<DevicePlace> topk_ids;
  std::optional<DevicePlace> topk_weights;
  std::optional<DevicePlace> output;
  bool wide_ids = false;  // int64
};

// How many of the rows have their `place` in device memory.
inline std::int64_t NumRowsWith(std::optional<DevicePlace> DeviceRows::*place,
                                const std::vector<DeviceRows>& rows) {
  std::int64_t count = 0;
  for (const DeviceRows& part : rows) count += (part.*place).has_value() ? part.num_rows : 0;
  return count;
}

// Whether a region is open at a worker.
struct DeviceRegionState {
  std::uint64_t region = 0;
  absl::Status status;
};

// Rows of one request that a worker could not read from its region, or not write to it; the batch
// is whole all the same.
struct RegionFault {
  std::int64_t first_row = 0;  // among the shard's
  absl::Status status;         // not OK
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_REGION_ROWS_H_
