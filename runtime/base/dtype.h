// Element types and their conversions to and from fp32. Conversions to a narrower type round to
// nearest even; NaN stays NaN. Pure functions, safe from any thread.
#ifndef EPSERVE_RUNTIME_BASE_DTYPE_H_
#define EPSERVE_RUNTIME_BASE_DTYPE_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace epserve::runtime {

enum class DataType : std::uint8_t { kFp32, kFp16, kBf16, kFp8E4m3, kInt32, kInt64 };

constexpr std::size_t DataTypeBytes(DataType type) {
  switch (type) {
    case DataType::kFp32:
    case DataType::kInt32:
      return 4;
    case DataType::kFp16:
    case DataType::kBf16:
      return 2;
    case DataType::kFp8E4m3:
      return 1;
    case DataType::kInt64:
      return 8;
  }
  return 0;
}

// "fp32", "fp16", "bf16", "fp8", "int32", "int64".
constexpr std::string_view DataTypeName(DataType type) {
  switch (type) {
    case DataType::kFp32:
      return "fp32";
    case DataType::kFp16:
      return "fp16";
    case DataType::kBf16:
      return "bf16";
    case DataType::kFp8E4m3:
      return "fp8";
    case DataType::kInt32:
      return "int32";
    case DataType::kInt64:
      return "int64";
  }
  return "unknown";
}

constexpr float Bf16ToFloat(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

constexpr std::uint16_t FloatToBf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: keep it quiet, never round it to Inf.
    return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  }
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float Fp16ToFloat(std::uint16_t bits);
std::uint16_t FloatToFp16(float value);  // Overflow gives Inf.
// OCP e4m3fn: no Inf; 0x7f and 0xff are NaN.
float Fp8E4m3ToFloat(std::uint8_t bits);
std::uint8_t FloatToFp8E4m3(float value);  // Saturates at 448.

// Converts `count` elements between fp32 and `type` (kFp32, kFp16, kBf16, kFp8E4m3).
// REQUIRES: the ranges do not overlap; `src`/`dst` of `type` are aligned to its size.
void ConvertToFloat(DataType type, const void* src, float* dst, std::size_t count);
void ConvertFromFloat(DataType type, const float* src, void* dst, std::size_t count);

// The index of the first NaN or Inf among `count` elements of `type` (as above); `count`: none.
std::size_t FindNonFinite(DataType type, const void* src, std::size_t count);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_DTYPE_H_
