// Whether a shard fits this worker and itself, as sizes and places follow from what it says, and
// whether its batch is small.
#ifndef EPSERVE_SERVER_WORKER_SHARD_CHECK_H_
#define EPSERVE_SERVER_WORKER_SHARD_CHECK_H_

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/checkpoint/model_info.h"
#include "runtime/routing/count_matrix.h"
#include "runtime/symmetric/row_arena.h"
#include "server/worker/control_messages.h"

namespace epserve::worker {

struct ShardLimits {
  std::int64_t max_batch_tokens = 0;
  std::int64_t max_shard_tokens = 0;
  const runtime::ModelInfo* model = nullptr;
  int rank = 0;
  const runtime::RowArena* arena = nullptr;  // the epoch's, where it is mapped
  bool has_regions = false;                  // clients' system regions are in reach
  bool takes_shared_batches = false;
};

// One row of the shard's type.
std::int64_t RowBytes(const Shard& shard, const runtime::ModelInfo& model);

// INVALID_ARGUMENT or INTERNAL, naming what does not fit.
absl::Status CheckShard(const Shard& shard, const ShardLimits& limits);

// Whether no rank has many rows to compute for the shard's batch, as each waits for the others.
// Where the counts are still to come, this rank's tokens tell of the others': shards are even.
bool IsSmall(const Shard& shard, int num_ranks);

// What the count matrix says of this rank's rows must be what was counted here: offsets in the
// peers' memory follow from it. INVALID_ARGUMENT or INTERNAL. REQUIRES: the shard has the matrix.
absl::Status CheckCounts(const Shard& shard, const runtime::ShardCounts& staged,
                         const runtime::Placement& placement, int rank,
                         std::int64_t max_batch_tokens);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_SHARD_CHECK_H_
