// The two things that dispatch and combine do to a row: copy it, and sum a few of them. Pure
// functions, safe from any thread.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_ROW_KERNELS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_ROW_KERNELS_H_

#include <cstddef>
#include <span>

#include "runtime/base/dtype.h"

namespace epserve::runtime {

// kCached leaves the copy in this core's caches; kStreamed writes around them, which saves reading
// the destination first and is the faster one where the rows of a batch exceed the caches anyway.
enum class CopyKind { kCached, kStreamed };

// Copies `bytes`. Streamed copies are visible to others only after FenceStreamedCopies.
// REQUIRES: no overlap; for kStreamed, `dst` is 16-byte aligned.
void CopyRow(CopyKind kind, const std::byte* src, std::byte* dst, std::size_t bytes);

// Orders all streamed copies of this thread before its later stores, a flag's among them.
void FenceStreamedCopies();

// out[h] = rows[0][h] + rows[1][h] + ..., added in that order in fp32 and rounded once.
// `rows` [n] each [count] of `type`, `out` [count]; kFp32, kFp16 or kBf16. No rows give zeros, and
// one row gives its very bits. `kind` is how `out` is written.
// REQUIRES: no overlap, all aligned to the element; for kStreamed, `out` is 16-byte aligned.
void SumRows(DataType type, CopyKind kind, std::span<const std::byte* const> rows, std::byte* out,
             std::size_t count);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_ROW_KERNELS_H_
