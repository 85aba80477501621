#include "server/worker/row_arena_mapping.h"

#include <utility>

#include "runtime/base/log.h"

namespace epserve::worker {

std::shared_ptr<runtime::RowArena> MapRowArena(const std::string& handle,
                                               const runtime::RowArenaSpec& spec) {
  if (handle.empty()) return nullptr;
  absl::StatusOr<std::shared_ptr<runtime::RowArena>> arena = runtime::RowArena::Open(handle, spec);
  if (arena.ok()) return *std::move(arena);
  runtime::LogInfo(
      "row_arena_not_mapped",
      {{"epoch", spec.epoch}, {"error", arena.status()}, {"effect", "rows come within messages"}});
  return nullptr;
}

void UseRowsInPlace(const runtime::RowArena& arena, runtime::Engine& engine) {
  const absl::Status pinned = engine.UseHostRows(arena.bytes());
  if (!pinned.ok()) runtime::LogWarning("rows_not_pinned", {{"error", pinned}});
}

DeviceRegionState SharedRows::Open(const OpenDeviceRegion& asked) const {
  if (device_regions != nullptr) return device_regions->Open(asked.region);
  return {asked.region.region,
          absl::UnavailableError("open region: the worker has left its epoch; retry")};
}

void SharedRows::Close(const CloseDeviceRegions& asked) const {
  if (device_regions != nullptr) device_regions->Close(asked.regions);
}

SharedRows ShareRows(const CreateHeap& offered, const runtime::RowArenaSpec& spec,
                     runtime::Engine& engine) {
  SharedRows shared;
  shared.device_regions = std::make_shared<OpenDeviceRegions>(&engine);
  shared.refused = shared.device_regions->OpenAll(offered.device_regions);
  shared.arena = MapRowArena(offered.row_arena, spec);
  if (shared.arena == nullptr) return shared;
  UseRowsInPlace(*shared.arena, engine);
  shared.regions = RegionFiles::Connect(offered.region_socket, offered.region_secret);
  return shared;
}

}  // namespace epserve::worker
