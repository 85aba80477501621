#include "runtime/alltoallv/row_kernels.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "runtime/base/simd.h"

namespace epserve::runtime {
namespace {

// Elements summed at a time: the running sum (2 KiB) stays in the first-level cache.
constexpr std::size_t kSumBlock = 512;
constexpr std::size_t kCacheLineBytes = 64;

// Two to four rows are what nearly every token has, and their sum stays in registers. One loop nest
// over any number of rows is no substitute: GCC 12 makes code of it that took four times as long.
using Fp32Row = const float* __restrict;

// Two bf16 elements in one word, the first one low. Widening each half where it stands, and
// rounding it there, takes two thirds of the time of code that spreads the elements out and packs
// them again.
typedef std::uint32_t Bf16Pair __attribute__((aligned(2), may_alias));
using Bf16Row = const Bf16Pair* __restrict;
constexpr std::uint32_t kHighHalf = 0xffff0000u;

float LowOf(std::uint32_t pair) { return std::bit_cast<float>(pair << 16); }
float HighOf(std::uint32_t pair) { return std::bit_cast<float>(pair & kHighHalf); }

// FloatToBf16 in the high half; the low one is anything.
std::uint32_t RoundedHigh(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
}

std::uint32_t PairOf(float low, float high) {
  return (RoundedHigh(low) >> 16) | (RoundedHigh(high) & kHighHalf);
}

EPS_MULTIVERSION void SumBf16(Bf16Row a, Bf16Row b, Bf16Pair* __restrict out, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = PairOf(LowOf(a[i]) + LowOf(b[i]), HighOf(a[i]) + HighOf(b[i]));
  }
}

EPS_MULTIVERSION void SumBf16(Bf16Row a, Bf16Row b, Bf16Row c, Bf16Pair* __restrict out,
                              std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    out[i] =
        PairOf(LowOf(a[i]) + LowOf(b[i]) + LowOf(c[i]), HighOf(a[i]) + HighOf(b[i]) + HighOf(c[i]));
  }
}

EPS_MULTIVERSION void SumBf16(Bf16Row a, Bf16Row b, Bf16Row c, Bf16Row d, Bf16Pair* __restrict out,
                              std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = PairOf(LowOf(a[i]) + LowOf(b[i]) + LowOf(c[i]) + LowOf(d[i]),
                    HighOf(a[i]) + HighOf(b[i]) + HighOf(c[i]) + HighOf(d[i]));
  }
}

EPS_MULTIVERSION void SumFp32(Fp32Row a, Fp32Row b, float* __restrict out, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

EPS_MULTIVERSION void SumFp32(Fp32Row a, Fp32Row b, Fp32Row c, float* __restrict out,
                              std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) out[i] = a[i] + b[i] + c[i];
}

EPS_MULTIVERSION void SumFp32(Fp32Row a, Fp32Row b, Fp32Row c, Fp32Row d, float* __restrict out,
                              std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) out[i] = a[i] + b[i] + c[i] + d[i];
}

EPS_MULTIVERSION void AddTo(Fp32Row values, float* __restrict sum, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) sum[i] += values[i];
}

// Any number of rows of any type, by way of fp32 copies; `byte` is where the block begins.
void SumAny(DataType type, std::span<const std::byte* const> rows, std::size_t byte, std::byte* out,
            std::size_t count) {
  float sum[kSumBlock];
  float values[kSumBlock];
  ConvertToFloat(type, rows[0] + byte, sum, count);
  for (const std::byte* row : rows.subspan(1)) {
    ConvertToFloat(type, row + byte, values, count);
    AddTo(values, sum, count);
  }
  ConvertFromFloat(type, sum, out, count);
}

// The sum of `count` <= kSumBlock elements from `byte` on of two rows or more.
void SumBlock(DataType type, std::span<const std::byte* const> rows, std::size_t byte,
              std::byte* out, std::size_t count) {
  const std::size_t num_rows = rows.size();
  if (type == DataType::kBf16 && num_rows <= 4) {
    if (count % 2 == 1) {  // The last one alone; what is left are pairs.
      --count;
      SumAny(type, rows, byte + 2 * count, out + 2 * count, 1);
    }
    const auto row = [&](int r) { return reinterpret_cast<const Bf16Pair*>(rows[r] + byte); };
    auto* sum = reinterpret_cast<Bf16Pair*>(out);
    if (num_rows == 2) return SumBf16(row(0), row(1), sum, count / 2);
    if (num_rows == 3) return SumBf16(row(0), row(1), row(2), sum, count / 2);
    return SumBf16(row(0), row(1), row(2), row(3), sum, count / 2);
  }
  if (type == DataType::kFp32 && num_rows <= 4) {
    const auto row = [&](int r) { return reinterpret_cast<const float*>(rows[r] + byte); };
    auto* sum = reinterpret_cast<float*>(out);
    if (num_rows == 2) return SumFp32(row(0), row(1), sum, count);
    if (num_rows == 3) return SumFp32(row(0), row(1), row(2), sum, count);
    return SumFp32(row(0), row(1), row(2), row(3), sum, count);
  }
  SumAny(type, rows, byte, out, count);
}

// Asks for what the block after next will need. The memory of one page tells the core nothing of
// the next one's, and rows of several ranks are read side by side: without this a large combine
// waits for memory at every page. Behind a row's end comes the next one of its rank.
void FetchAhead(std::span<const std::byte* const> rows, std::size_t byte, std::size_t block_bytes) {
  for (const std::byte* row : rows) {
    const std::byte* const ahead = row + byte + 2 * block_bytes;
    for (std::size_t at = 0; at < block_bytes; at += kCacheLineBytes) {
      __builtin_prefetch(ahead + at);
    }
  }
}

}  // namespace

void SumRows(DataType type, CopyKind kind, std::span<const std::byte* const> rows, std::byte* out,
             std::size_t count) {
  const std::size_t element_bytes = DataTypeBytes(type);
  if (rows.empty()) {
    std::memset(out, 0, count * element_bytes);
    return;
  }
  if (rows.size() == 1) {
    CopyBytes(kind, rows[0], out, count * element_bytes);
    return;
  }
  alignas(kCacheLineBytes) std::byte block[kSumBlock * sizeof(float)];
  for (std::size_t begin = 0; begin < count; begin += kSumBlock) {
    const std::size_t length = std::min(kSumBlock, count - begin);
    const std::size_t byte = begin * element_bytes;
    if (kind == CopyKind::kStreamed) {
      FetchAhead(rows, byte, length * element_bytes);
      SumBlock(type, rows, byte, block, length);
      CopyBytes(kind, block, out + byte, length * element_bytes);
    } else {
      SumBlock(type, rows, byte, out + byte, length);
    }
  }
}

}  // namespace epserve::runtime
