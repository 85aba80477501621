// The worker's view of the epoch's row arena.
#ifndef EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_
#define EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_

#include <memory>
#include <string>

#include "runtime/symmetric/row_arena.h"

namespace epserve::worker {

// Null where the coordinator offers none (an empty handle) or it cannot be had here: a worker on
// another machine, or in a container with shared memory of its own, gets its rows in messages, and
// the log says so.
std::shared_ptr<runtime::RowArena> MapRowArena(const std::string& handle,
                                               const runtime::RowArenaSpec& spec);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_ROW_ARENA_MAPPING_H_
