#include "runtime/base/dtype.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "runtime/base/simd.h"

namespace epserve::runtime {
namespace {

std::array<float, 256> MakeFp8Table() {
  std::array<float, 256> table{};
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = (bits >> 3) & 0xf;
    const int mantissa = bits & 0x7;
    float value;
    if (exponent == 0xf && mantissa == 0x7) {
      value = std::bit_cast<float>(0x7fc00000u);
    } else if (exponent == 0) {
      value = std::ldexp(static_cast<float>(mantissa), -9);
    } else {
      value = std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - 7);
    }
    table[bits] = (bits & 0x80) != 0 ? -value : value;
  }
  return table;
}

const std::array<float, 256>& Fp8Table() {
  static const std::array<float, 256> table = MakeFp8Table();
  return table;
}

EPS_MULTIVERSION void Bf16RowToFloat(const std::uint16_t* src, float* dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = Bf16ToFloat(src[i]);
}

EPS_MULTIVERSION void FloatRowToBf16(const float* src, std::uint16_t* dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = FloatToBf16(src[i]);
}

EPS_MULTIVERSION void Fp16RowToFloat(const std::uint16_t* src, float* dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = Fp16ToFloat(src[i]);
}

EPS_MULTIVERSION void FloatRowToFp16(const float* src, std::uint16_t* dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = FloatToFp16(src[i]);
}

// The largest magnitude in bits, which grow with it: NaN and Inf have the largest. Signed, because
// that maximum is one instruction on every x86-64.
EPS_MULTIVERSION std::int16_t LargestMagnitude(const std::int16_t* src, std::size_t count) {
  std::int16_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<std::int16_t>(src[i] & 0x7fff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

EPS_MULTIVERSION std::int32_t LargestMagnitude(const std::int32_t* src, std::size_t count) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t magnitude = src[i] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

EPS_MULTIVERSION std::uint8_t LargestMagnitude(const std::uint8_t* src, std::size_t count) {
  std::uint8_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<std::uint8_t>(src[i] & 0x7f);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The first element whose magnitude reaches `limit`.
template <typename Bits>
std::size_t FindMagnitude(const void* src, std::size_t count, Bits limit) {
  const auto* bits = static_cast<const Bits*>(src);
  constexpr std::size_t kBlock = 4096;
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t end = std::min(count, begin + kBlock);
    if (LargestMagnitude(bits + begin, end - begin) < limit) continue;
    std::size_t i = begin;
    while (LargestMagnitude(bits + i, 1) < limit) ++i;
    return i;
  }
  return count;
}

}  // namespace

std::size_t FindNonFinite(DataType type, const void* src, std::size_t count) {
  switch (type) {
    case DataType::kFp32:
      return FindMagnitude<std::int32_t>(src, count, 0x7f800000);
    case DataType::kFp16:
      return FindMagnitude<std::int16_t>(src, count, 0x7c00);
    case DataType::kBf16:
      return FindMagnitude<std::int16_t>(src, count, 0x7f80);
    case DataType::kFp8E4m3:
      return FindMagnitude<std::uint8_t>(src, count, 0x7f);
    case DataType::kInt32:
    case DataType::kInt64:
      return count;  // Every one is finite.
  }
  return count;
}

float Fp16ToFloat(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf and NaN.
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Scaling by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1.0p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

std::uint16_t FloatToFp16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN.
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to Inf.
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 puts its ulp (2^-24) at the sum's last bit.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(sum) - 0x3f000000u);
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<std::uint16_t>((rounded - 0x38000000u) >> 13);
}

float Fp8E4m3ToFloat(std::uint8_t bits) { return Fp8Table()[bits]; }

std::uint8_t FloatToFp8E4m3(float value) {
  const std::uint8_t sign = std::signbit(value) ? 0x80 : 0x00;
  const float magnitude = std::fabs(value);
  if (std::isnan(magnitude)) return sign | 0x7f;
  if (magnitude >= 448.0f) return sign | 0x7e;
  if (magnitude == 0.0f) return sign;  // frexp gives it an exponent of 0, which is not a small one.
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = m * 2^exponent, m in [0.5, 1).
  const int ulp_exponent = exponent - 1 < -6 ? -9 : exponent - 4;
  // nearbyint rounds to nearest even under the default rounding mode.
  const float steps = std::nearbyint(std::ldexp(magnitude, -ulp_exponent));
  const int count = static_cast<int>(steps);
  if (ulp_exponent == -9) return sign | static_cast<std::uint8_t>(count);  // 8 carries into 2^-6.
  const int biased = ulp_exponent + 3 + 7;
  return sign | static_cast<std::uint8_t>((biased << 3) + (count - 8));
}

void ConvertToFloat(DataType type, const void* src, float* dst, std::size_t count) {
  switch (type) {
    case DataType::kFp32:
      if (count > 0) std::memcpy(dst, src, count * sizeof(float));
      return;
    case DataType::kBf16:
      Bf16RowToFloat(static_cast<const std::uint16_t*>(src), dst, count);
      return;
    case DataType::kFp16:
      Fp16RowToFloat(static_cast<const std::uint16_t*>(src), dst, count);
      return;
    case DataType::kFp8E4m3: {
      const auto* bytes = static_cast<const std::uint8_t*>(src);
      const auto& table = Fp8Table();
      for (std::size_t i = 0; i < count; ++i) dst[i] = table[bytes[i]];
      return;
    }
    case DataType::kInt32:
    case DataType::kInt64:
      return;  // REQUIRES excludes them.
  }
}

void ConvertFromFloat(DataType type, const float* src, void* dst, std::size_t count) {
  switch (type) {
    case DataType::kFp32:
      if (count > 0) std::memcpy(dst, src, count * sizeof(float));
      return;
    case DataType::kBf16:
      FloatRowToBf16(src, static_cast<std::uint16_t*>(dst), count);
      return;
    case DataType::kFp16:
      FloatRowToFp16(src, static_cast<std::uint16_t*>(dst), count);
      return;
    case DataType::kFp8E4m3: {
      auto* bytes = static_cast<std::uint8_t*>(dst);
      for (std::size_t i = 0; i < count; ++i) bytes[i] = FloatToFp8E4m3(src[i]);
      return;
    }
    case DataType::kInt32:
    case DataType::kInt64:
      return;
  }
}

}  // namespace epserve::runtime
