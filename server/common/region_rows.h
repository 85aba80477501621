// Rows of a shard in the shared memory of clients, as both sides of the workers' stream have them.
#ifndef EPSERVE_SERVER_COMMON_REGION_ROWS_H_
#define EPSERVE_SERVER_COMMON_REGION_ROWS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace epserve::server {

struct RegionRows {
  std::uint64_t region = 0;
  std::string label;
  std::uint64_t object_offset = 0;
  std::int64_t first_row = 0;  // among the shard's
  std::int64_t num_rows = 0;
};

// Rows of one request that a worker could not read from its region, or not write to it; the batch
// is whole all the same.
struct RegionFault {
  std::int64_t first_row = 0;  // among the shard's
  absl::Status status;         // not OK
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_REGION_ROWS_H_
