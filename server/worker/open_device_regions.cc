#include "server/worker/open_device_regions.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "server/common/region_io.h"

namespace epserve::worker {

DeviceRegionState OpenDeviceRegions::Open(const DeviceRegionInfo& info) {
  runtime::DeviceRegions* const opener = engine_->device_regions();
  if (opener == nullptr) {
    return {info.region,
            absl::FailedPreconditionError(absl::StrCat(
                "open region: the ", std::string(engine_->backend()),
                " backend has no GPU to reach CUDA memory from; use system shared memory, or send "
                "the tensors inline"))};
  }
  auto opened = opener->Open({info.handle, info.device_id, info.size_bytes});
  if (!opened.ok()) return {info.region, opened.status()};
  runtime::LogInfo("device_region_opened", {{"region", info.region}, {"bytes", info.size_bytes}});
  std::lock_guard<std::mutex> lock(mutex_);
  open_[info.region] = {*std::move(opened), info.label, info.size_bytes};
  return {info.region, absl::OkStatus()};
}

std::vector<DeviceRegionState> OpenDeviceRegions::OpenAll(std::span<const DeviceRegionInfo> infos) {
  std::vector<DeviceRegionState> refused;
  for (const DeviceRegionInfo& info : infos) {
    DeviceRegionState state = Open(info);
    if (state.status.ok()) continue;
    runtime::LogWarning("device_region_refused",
                        {{"region", info.region}, {"error", state.status}});
    refused.push_back(std::move(state));
  }
  return refused;
}

void OpenDeviceRegions::Close(std::span<const std::uint64_t> regions) {
  std::vector<Entry> closed;  // After the lock is given up.
  std::lock_guard<std::mutex> lock(mutex_);
  for (const std::uint64_t region : regions) {
    if (auto entry = open_.extract(region)) closed.push_back(std::move(entry.mapped()));
  }
}

std::size_t OpenDeviceRegions::num_open() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return open_.size();
}

absl::StatusOr<OpenDeviceRegions::Located> OpenDeviceRegions::Locate(
    const server::DevicePlace& place, std::uint64_t size_bytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = open_.find(place.region);
  if (found == open_.end()) {
    return absl::InternalError(
        absl::StrCat("shard: device region ", place.region, " is not open at this worker"));
  }
  const Entry& entry = found->second;
  if (!server::Fits(place.offset_bytes, size_bytes, entry.size_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("shard: ", size_bytes, " bytes at offset ",
                                                   place.offset_bytes, " pass the end of region ",
                                                   entry.label, " of ", entry.size_bytes));
  }
  return Located{entry.region, entry.region->data() + place.offset_bytes};
}

}  // namespace epserve::worker
