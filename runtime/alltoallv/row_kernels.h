// What combine does to rows: it sums a few of them. Pure functions, safe from any thread.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_ROW_KERNELS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_ROW_KERNELS_H_

#include <cstddef>
#include <span>

#include "runtime/base/dtype.h"
#include "runtime/base/streamed_copy.h"

namespace epserve::runtime {

// out[h] = rows[0][h] + rows[1][h] + ..., added in that order in fp32 and rounded once.
// `rows` [n] each [count] of `type`, `out` [count]; kFp32, kFp16 or kBf16. No rows give zeros, and
// one row gives its very bits. `kind` is how `out` is written.
// REQUIRES: no overlap, all aligned to the element.
void SumRows(DataType type, CopyKind kind, std::span<const std::byte* const> rows, std::byte* out,
             std::size_t count);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_ROW_KERNELS_H_
