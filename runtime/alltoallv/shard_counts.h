// What a rank tells its peers about a batch, checked before any of them reads it.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_SHARD_COUNTS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_SHARD_COUNTS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

// INVALID_ARGUMENT: there is no such slot.
absl::Status ValidateCountsSlot(const ExchangeConfig& config, int slot);
// INVALID_ARGUMENT names what is outside the config: a batch's number `sequence` that does not
// exceed the slot's `last`, or an entry of the counts. REQUIRES: the slot is valid.
absl::Status ValidateShardCounts(const ExchangeConfig& config, int slot, std::uint64_t sequence,
                                 std::uint64_t last, const ShardCounts& counts);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_SHARD_COUNTS_H_
