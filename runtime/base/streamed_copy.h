// Copies of bytes, through the caches or around them. Pure functions, safe from any thread.
#ifndef EPSERVE_RUNTIME_BASE_STREAMED_COPY_H_
#define EPSERVE_RUNTIME_BASE_STREAMED_COPY_H_

#include <cstddef>
#include <cstdint>

namespace epserve::runtime {

// kCached leaves the copy in this core's caches; kStreamed writes around them, which saves reading
// the destination first and is the faster one where all that is copied exceeds the caches anyway.
enum class CopyKind { kCached, kStreamed };

// The faster one for a phase that writes so many bytes.
CopyKind CopyKindFor(std::uint64_t written_bytes);

// Copies `bytes`. Streamed copies are visible to others only after FenceStreamedCopies.
// REQUIRES: no overlap.
void CopyBytes(CopyKind kind, const std::byte* src, std::byte* dst, std::size_t bytes);

// Orders all streamed copies of this thread before its later stores, a flag's among them.
void FenceStreamedCopies();

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_STREAMED_COPY_H_
