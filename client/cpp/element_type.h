// Element types of tensors as safetensors files and the KServe v2 protocol name them, and their
// conversion to and from double. Pure functions; safe from any thread.
#ifndef EPSERVE_CLIENT_CPP_ELEMENT_TYPE_H_
#define EPSERVE_CLIENT_CPP_ELEMENT_TYPE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace epserve::client {

enum class ElementType {
  kBool,
  kU8,
  kI8,
  kF8E5m2,
  kF8E4m3,
  kI16,
  kU16,
  kF16,
  kBf16,
  kI32,
  kU32,
  kF32,
  kF64,
  kI64,
  kU64,
};

// Bytes of one element.
std::size_t ElementSize(ElementType type);

// "BF16", "F8_E4M3", "I64": as in a safetensors header.
const char* SafetensorsName(ElementType type);
std::optional<ElementType> FromSafetensorsName(const std::string& name);

// "BF16", "FP32", "INT64": as in the KServe v2 protocol; null where the protocol has no name.
const char* KserveName(ElementType type);
std::optional<ElementType> FromKserveName(const std::string& name);

// Exact for every value of the format. E4M3 is the "fn" variant: no infinities, 0x7f and 0xff NaN.
double DecodeFp16(std::uint16_t bits);
double DecodeBf16(std::uint16_t bits);
double DecodeFp8E4m3(std::uint8_t bits);

// Round to nearest, ties to even. FP16 and BF16 overflow to infinity, E4M3 saturates at 448.
std::uint16_t EncodeFp16(double value);
std::uint16_t EncodeBf16(double value);
std::uint8_t EncodeFp8E4m3(double value);

// Types that DecodeToDouble and EncodeFromDouble know: F8_E4M3, F16, BF16, F32, F64, I32, I64.
bool IsConvertible(ElementType type);

// Reads `count` little-endian elements at `source` (any alignment). REQUIRES: IsConvertible(type).
void DecodeToDouble(ElementType type, const char* source, std::size_t count, double* destination);
// Writes `count` elements at `destination` (any alignment). REQUIRES: IsConvertible(type).
void EncodeFromDouble(ElementType type, const double* source, std::size_t count, char* destination);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_ELEMENT_TYPE_H_
