// The worker's view of the epoch's row arena.
#ifndef EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_
#define EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_

#include <memory>
#include <string>

#include "runtime/engine/engine.h"
#include "runtime/symmetric/row_arena.h"

namespace epserve::worker {

// Null where the coordinator offers none (an empty handle) or it cannot be had here: a worker on
// another machine, or in a container with shared memory of its own, gets its rows in messages, and
// the log says so.
std::shared_ptr<runtime::RowArena> MapRowArena(const std::string& handle,
                                               const runtime::RowArenaSpec& spec);

// Lets a device engine copy straight from and to the arena, until its epoch is closed. Where that
// is not to be had, rows take a copy more, and the log says so.
void UseRowsInPlace(const runtime::RowArena& arena, runtime::Engine& engine);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_
