// The sums that combine takes over the partial rows of a shard's tokens. A token's is taken once
// all ranks that have a part in it are ready, so that the sums of some tokens are taken while other
// ranks still work. Pure functions; thread safety: none needed.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_PARTIAL_SUMS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_PARTIAL_SUMS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "runtime/base/dtype.h"
#include "runtime/base/streamed_copy.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

struct PartialSums {
  DataType dtype = DataType::kFp32;
  std::int64_t hidden = 0;                            // H
  std::span<const std::uint64_t> token_destinations;  // [T] bit r: rank r has a part in the token
  // [R] by rank: its rows [.., H] of the tokens that it has a part in, in their order.
  std::array<const std::byte*, kMaxRanks> rows{};
  CopyKind kind = CopyKind::kCached;  // how `out` is written; streamed: FenceStreamedCopies is due
  std::byte* out = nullptr;           // [T, H]
};

// Writes the sums of the tokens whose ranks are all `ready`, but not of those whose ranks all were
// so `before`, at the last call; nullopt: this is the first. In fp32 in the order of ranks, so that
// the bits are the same whenever a sum is taken. Touches no other token's rows or place.
void SumReadyTokens(const PartialSums& sums, std::uint64_t ready,
                    std::optional<std::uint64_t> before);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_PARTIAL_SUMS_H_
