#include "server/worker/shard_input.h"

#include "server/worker/shard_check.h"

namespace epserve::worker {

std::byte* ArenaRows(const Shard& shard, const runtime::ModelInfo& model,
                     const runtime::RowArena& arena) {
  return arena.rows(shard.row_block) + shard.first_row * RowBytes(shard, model);
}

runtime::ShardInput MakeShardInput(const Shard& shard, const runtime::ModelInfo& model,
                                   const runtime::RowArena* arena, const DeviceShard& on_device) {
  runtime::ShardInput input{.slot = shard.slot,
                            .sequence = shard.batch,
                            .layer = shard.layer,
                            .dtype = shard.dtype,
                            .num_tokens = shard.num_tokens,
                            .topk = shard.topk,
                            .hidden = shard.hidden.data()};
  input.device_rows = on_device.rows();
  if (shard.in_arena) {
    input.hidden = ArenaRows(shard, model, *arena);
    input.output = ArenaRows(shard, model, *arena);
  }
  if (!shard.routed || on_device.routing_left()) return input;
  if (on_device.topk_ids() != nullptr) {
    input.topk_ids = on_device.topk_ids();
    input.topk_weights = on_device.topk_weights();
  } else if (shard.in_arena) {
    const std::int32_t* const ids = arena->topk_ids(shard.slot);
    const float* const weights = arena->topk_weights(shard.slot);
    input.topk_ids = ids + shard.first_row * shard.topk;
    input.topk_weights = weights + shard.first_row * shard.topk;
    if (!shard.shard_begin.empty()) {
      input.shared = {shard.shard_begin, arena->rows(shard.row_block), ids, weights,
                      shard.rows_follow};
    }
  } else {
    input.topk_ids = reinterpret_cast<const std::int32_t*>(shard.topk_ids.data());
    input.topk_weights = reinterpret_cast<const float*>(shard.topk_weights.data());
  }
  return input;
}

}  // namespace epserve::worker
