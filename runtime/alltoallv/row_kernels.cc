#include "runtime/alltoallv/row_kernels.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "runtime/base/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace epserve::runtime {
namespace {

// Elements summed at a time: the running sum (2 KiB) stays in the first-level cache.
constexpr std::size_t kSumBlock = 512;
constexpr std::size_t kCacheLineBytes = 64;

// Each of these writes the sum of elements [begin, begin + count) of `rows` to out [count], where
// count <= kSumBlock.

EPS_MULTIVERSION void SumBf16(const std::byte* const* rows, std::size_t num_rows, std::size_t begin,
                              std::uint16_t* out, std::size_t count) {
  float sum[kSumBlock];
  const auto* first = reinterpret_cast<const std::uint16_t*>(rows[0]) + begin;
  for (std::size_t i = 0; i < count; ++i) sum[i] = Bf16ToFloat(first[i]);
  for (std::size_t r = 1; r < num_rows; ++r) {
    const auto* row = reinterpret_cast<const std::uint16_t*>(rows[r]) + begin;
    for (std::size_t i = 0; i < count; ++i) sum[i] += Bf16ToFloat(row[i]);
  }
  for (std::size_t i = 0; i < count; ++i) out[i] = FloatToBf16(sum[i]);
}

EPS_MULTIVERSION void SumFp32(const std::byte* const* rows, std::size_t num_rows, std::size_t begin,
                              float* out, std::size_t count) {
  float sum[kSumBlock];
  const auto* first = reinterpret_cast<const float*>(rows[0]) + begin;
  for (std::size_t i = 0; i < count; ++i) sum[i] = first[i];
  for (std::size_t r = 1; r < num_rows; ++r) {
    const auto* row = reinterpret_cast<const float*>(rows[r]) + begin;
    for (std::size_t i = 0; i < count; ++i) sum[i] += row[i];
  }
  for (std::size_t i = 0; i < count; ++i) out[i] = sum[i];
}

EPS_MULTIVERSION void AddTo(const float* values, float* sum, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) sum[i] += values[i];
}

void SumFp16(const std::byte* const* rows, std::size_t num_rows, std::size_t begin,
             std::uint16_t* out, std::size_t count) {
  float sum[kSumBlock];
  float values[kSumBlock];
  const std::size_t begin_byte = begin * sizeof(std::uint16_t);
  ConvertToFloat(DataType::kFp16, rows[0] + begin_byte, sum, count);
  for (std::size_t r = 1; r < num_rows; ++r) {
    ConvertToFloat(DataType::kFp16, rows[r] + begin_byte, values, count);
    AddTo(values, sum, count);
  }
  ConvertFromFloat(DataType::kFp16, sum, out, count);
}

void SumBlock(DataType type, std::span<const std::byte* const> rows, std::size_t begin,
              std::byte* out, std::size_t count) {
  switch (type) {
    case DataType::kFp32:
      SumFp32(rows.data(), rows.size(), begin, reinterpret_cast<float*>(out), count);
      return;
    case DataType::kBf16:
      SumBf16(rows.data(), rows.size(), begin, reinterpret_cast<std::uint16_t*>(out), count);
      return;
    case DataType::kFp16:
      SumFp16(rows.data(), rows.size(), begin, reinterpret_cast<std::uint16_t*>(out), count);
      return;
    case DataType::kFp8E4m3:
    case DataType::kInt32:
    case DataType::kInt64:
      return;  // REQUIRES excludes them.
  }
}

}  // namespace

void CopyRow(CopyKind kind, const std::byte* src, std::byte* dst, std::size_t bytes) {
  std::size_t done = 0;
#if defined(__SSE2__)
  if (kind == CopyKind::kStreamed) {
    // A whole cache line at a time, so that the write-combining buffer leaves in one piece.
    for (; done + 64 <= bytes; done += 64) {
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

void SumRows(DataType type, CopyKind kind, std::span<const std::byte* const> rows,
             std::span<const std::byte* const> next_rows, std::byte* out, std::size_t count) {
  const std::size_t element_bytes = DataTypeBytes(type);
  alignas(kCacheLineBytes) std::byte block[kSumBlock * sizeof(float)];
  for (std::size_t begin = 0; begin < count; begin += kSumBlock) {
    const std::size_t length = std::min(kSumBlock, count - begin);
    const std::size_t begin_byte = begin * element_bytes;
    const std::size_t length_bytes = length * element_bytes;
    for (const std::byte* row : next_rows) {
      for (std::size_t byte = 0; byte < length_bytes; byte += kCacheLineBytes) {
        __builtin_prefetch(row + begin_byte + byte, /*rw=*/0, /*locality=*/2);
      }
    }
    if (rows.empty()) {
      std::memset(out + begin_byte, 0, length_bytes);
    } else if (rows.size() == 1) {
      CopyRow(kind, rows[0] + begin_byte, out + begin_byte, length_bytes);
    } else if (kind == CopyKind::kStreamed) {
      SumBlock(type, rows, begin, block, length);
      CopyRow(kind, block, out + begin_byte, length_bytes);
    } else {
      SumBlock(type, rows, begin, out + begin_byte, length);
    }
  }
}

}  // namespace epserve::runtime
