// The worker's view of what is shared with it in an epoch: by the coordinator of its machine the
// row arena, and the descriptors of clients' regions; by clients their CUDA memory.
#ifndef EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_
#define EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_

#include <memory>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/symmetric/row_arena.h"
#include "server/worker/control_messages.h"
#include "server/worker/open_device_regions.h"
#include "server/worker/region_files.h"

namespace epserve::worker {

// Null where the coordinator offers none (an empty handle) or it cannot be had here: a worker on
// another machine, or in a container with shared memory of its own, gets its rows in messages, and
// the log says so.
std::shared_ptr<runtime::RowArena> MapRowArena(const std::string& handle,
                                               const runtime::RowArenaSpec& spec);

// Lets a device engine copy straight from and to the arena, until its epoch is closed. Where that
// is not to be had, rows take a copy more, and the log says so.
void UseRowsInPlace(const runtime::RowArena& arena, runtime::Engine& engine);

struct SharedRows {
  std::shared_ptr<runtime::RowArena> arena;  // null: rows come in messages
  std::shared_ptr<RegionFiles> regions;      // null: no rows come from clients' regions
  std::shared_ptr<OpenDeviceRegions> device_regions;
  std::vector<DeviceRegionState> refused;  // device regions that are not open here

  // UNAVAILABLE: no epoch is open.
  DeviceRegionState Open(const OpenDeviceRegion& asked) const;
  void Close(const CloseDeviceRegions& asked) const;
};

// All, as far as they are to be had here; regions only with the arena, which their rows go through.
SharedRows ShareRows(const CreateHeap& offered, const runtime::RowArenaSpec& spec,
                     runtime::Engine& engine);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_
