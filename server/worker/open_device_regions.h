// Clients' CUDA memory that this worker has open in the present epoch.
// Thread-safe. Invariants: opening and closing happen on one thread, and while no batch runs.
#ifndef EPSERVE_SERVER_WORKER_OPEN_DEVICE_REGIONS_H_
#define EPSERVE_SERVER_WORKER_OPEN_DEVICE_REGIONS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/engine/device_regions.h"
#include "runtime/engine/engine.h"
#include "server/worker/control_messages.h"

namespace epserve::worker {

class OpenDeviceRegions {
 public:
  // `engine` outlives this.
  explicit OpenDeviceRegions(runtime::Engine* engine) : engine_(engine) {}

  // FAILED_PRECONDITION: this worker's backend has no device memory. Else as DeviceRegions::Open.
  DeviceRegionState Open(const DeviceRegionInfo& info);
  // Those of `infos` that could not be opened.
  std::vector<DeviceRegionState> OpenAll(std::span<const DeviceRegionInfo> infos);
  // REQUIRES: no batch uses them.
  void Close(std::span<const std::uint64_t> regions);
  std::size_t num_open() const;

  // Keeps the region open for as long as it lives, and says where `size_bytes` from the place on
  // are. INTERNAL: it is not open. INVALID_ARGUMENT: they pass its end.
  struct Located {
    std::shared_ptr<const runtime::DeviceRegion> region;
    std::byte* data = nullptr;
  };
  absl::StatusOr<Located> Locate(const server::DevicePlace& place, std::uint64_t size_bytes) const;

 private:
  struct Entry {
    std::shared_ptr<const runtime::DeviceRegion> region;
    std::string label;
    std::uint64_t size_bytes = 0;
  };

  runtime::Engine* const engine_;
  mutable std::mutex mutex_;
  std::map<std::uint64_t, Entry> open_;  // guarded by mutex_
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_OPEN_DEVICE_REGIONS_H_
