// A shard as the engine takes it: where its tensors stand on this worker, be that the message, the
// row arena, or what was fetched from device regions. Pure functions; what they point to is the
// shard's, the arena's and the device shard's.
#ifndef EPSERVE_SERVER_WORKER_SHARD_INPUT_H_
#define EPSERVE_SERVER_WORKER_SHARD_INPUT_H_

#include <cstddef>

#include "runtime/checkpoint/model_info.h"
#include "runtime/engine/engine.h"
#include "runtime/symmetric/row_arena.h"
#include "server/worker/control_messages.h"
#include "server/worker/device_shard.h"

namespace epserve::worker {

// The first of the shard's rows. REQUIRES: the shard is in the arena.
std::byte* ArenaRows(const Shard& shard, const runtime::ModelInfo& model,
                     const runtime::RowArena& arena);

// REQUIRES: CheckShard found it right; `arena` is there where the shard is in one.
runtime::ShardInput MakeShardInput(const Shard& shard, const runtime::ModelInfo& model,
                                   const runtime::RowArena* arena, const DeviceShard& on_device);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_SHARD_INPUT_H_
