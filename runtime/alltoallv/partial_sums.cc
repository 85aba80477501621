#include "runtime/alltoallv/partial_sums.h"

#include <bit>

#include "runtime/alltoallv/row_kernels.h"

namespace epserve::runtime {

void SumReadyTokens(const PartialSums& sums, std::uint64_t ready,
                    std::optional<std::uint64_t> before) {
  const std::uint64_t row_bytes =
      static_cast<std::uint64_t>(sums.hidden) * DataTypeBytes(sums.dtype);
  std::array<const std::byte*, kMaxRanks> next = sums.rows;
  std::array<const std::byte*, kMaxRanks> rows{};
  std::byte* out = sums.out;
  for (const std::uint64_t destinations : sums.token_destinations) {
    const bool was_ready = before.has_value() && (destinations & ~*before) == 0;
    const bool is_due = (destinations & ~ready) == 0 && !was_ready;
    std::size_t num_rows = 0;
    for (std::uint64_t left = destinations; left != 0; left &= left - 1) {
      const int rank = std::countr_zero(left);
      rows[num_rows++] = next[rank];
      next[rank] += row_bytes;
    }
    if (is_due) {
      SumRows(sums.dtype, sums.kind, std::span(rows).first(num_rows), out,
              static_cast<std::size_t>(sums.hidden));
    }
    out += row_bytes;
  }
}

}  // namespace epserve::runtime
