#include "runtime/base/streamed_copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace epserve::runtime {

CopyKind CopyKindFor(std::uint64_t written_bytes) {
  // More than the second-level cache of a core holds. On a 2-core EPYC a 4 KiB row takes 0.16 us
  // around the caches, and 0.27 us through them.
  constexpr std::uint64_t kStreamedBytes = std::uint64_t{1} << 20;
  return written_bytes > kStreamedBytes ? CopyKind::kStreamed : CopyKind::kCached;
}

void CopyBytes(CopyKind kind, const std::byte* src, std::byte* dst, std::size_t bytes) {
  std::size_t done = 0;
#if defined(__SSE2__)
  if (kind == CopyKind::kStreamed) {
    // A whole cache line at a time, so that the write-combining buffer leaves in one piece. Up to
    // the first one's begin it is an ordinary copy.
    constexpr std::size_t kLine = 64;
    done = std::min(bytes, (kLine - reinterpret_cast<std::uintptr_t>(dst) % kLine) % kLine);
    if (done > 0) std::memcpy(dst, src, done);
    for (; done + kLine <= bytes; done += kLine) {
      const auto* from = reinterpret_cast<const __m128i*>(src + done);
      auto* to = reinterpret_cast<__m128i*>(dst + done);
      const __m128i a = _mm_loadu_si128(from);
      const __m128i b = _mm_loadu_si128(from + 1);
      const __m128i c = _mm_loadu_si128(from + 2);
      const __m128i d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
  }
#else
  static_cast<void>(kind);  // Streamed is a hint; here every copy is an ordinary one.
#endif
  if (done < bytes) std::memcpy(dst + done, src + done, bytes - done);
}

void FenceStreamedCopies() {
#if defined(__SSE2__)
  // Non-temporal stores are not ordered by a release store. Pairs with the acquire of whoever sees
  // the flag that the caller raises next.
  _mm_sfence();
#endif
}

}  // namespace epserve::runtime
