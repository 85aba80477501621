#include "client/cpp/element_type.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>

namespace epserve::client {

static_assert(std::endian::native == std::endian::little,
              "tensors are little-endian on the wire and in files, and are used as they lie");

namespace {

struct TypeRow {
  ElementType type;
  std::size_t size;
  const char* safetensors;
  const char* kserve;  // Null: not in the protocol.
};

constexpr std::array<TypeRow, 15> kTypes = {{
    {ElementType::kBool, 1, "BOOL", "BOOL"},
    {ElementType::kU8, 1, "U8", "UINT8"},
    {ElementType::kI8, 1, "I8", "INT8"},
    {ElementType::kF8E5m2, 1, "F8_E5M2", nullptr},
    {ElementType::kF8E4m3, 1, "F8_E4M3", nullptr},
    {ElementType::kI16, 2, "I16", "INT16"},
    {ElementType::kU16, 2, "U16", "UINT16"},
    {ElementType::kF16, 2, "F16", "FP16"},
    {ElementType::kBf16, 2, "BF16", "BF16"},
    {ElementType::kI32, 4, "I32", "INT32"},
    {ElementType::kU32, 4, "U32", "UINT32"},
    {ElementType::kF32, 4, "F32", "FP32"},
    {ElementType::kF64, 8, "F64", "FP64"},
    {ElementType::kI64, 8, "I64", "INT64"},
    {ElementType::kU64, 8, "U64", "UINT64"},
}};

const TypeRow& Row(ElementType type) { return kTypes[static_cast<std::size_t>(type)]; }

// An IEEE-like format: sign, `exponent_bits`, `mantissa_bits`, gradual underflow.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  std::uint32_t overflow_code;  // What a magnitude past the largest finite value becomes.
  std::uint32_t max_code;       // The largest finite magnitude.
  std::uint32_t nan_code;
};
constexpr Format kFp16 = {5, 10, 0x7c00, 0x7bff, 0x7e00};
constexpr Format kFp8E4m3 = {4, 3, 0x7e, 0x7e, 0x7f};

std::uint32_t EncodeSmallFloat(double value, const Format& format) {
  const std::uint32_t sign =
      std::signbit(value) ? 1u << (format.exponent_bits + format.mantissa_bits) : 0u;
  if (std::isnan(value)) return sign | format.nan_code;
  if (std::isinf(value)) return sign | format.overflow_code;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = m * 2^exponent, m in [0.5, 1)
  const int min_exponent = 1 - bias;
  const int unbiased = exponent - 1 < min_exponent ? min_exponent : exponent - 1;
  // The spacing of representable values around `magnitude` is 2^(unbiased - mantissa_bits).
  const double steps = std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - unbiased));
  // Rounding up to the next power of two carries into the exponent field by itself, and where
  // `unbiased` is the smallest exponent the same sum gives subnormals.
  const std::uint64_t code =
      (static_cast<std::uint64_t>(unbiased - min_exponent) << format.mantissa_bits) +
      static_cast<std::uint64_t>(steps);
  return sign | (code > format.max_code ? format.overflow_code : static_cast<std::uint32_t>(code));
}

std::array<double, 256> MakeFp8Table() {
  std::array<double, 256> table{};
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = (bits >> 3) & 15;
    const int mantissa = bits & 7;
    double value =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    if (exponent == 15 && mantissa == 7) value = std::nan("");
    table[bits] = (bits & 0x80) != 0 ? -value : value;
  }
  return table;
}

template <typename T>
void DecodeAs(const char* source, std::size_t count, double* destination) {
  for (std::size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, source + i * sizeof(T), sizeof(T));
    destination[i] = static_cast<double>(value);
  }
}

template <typename T>
void EncodeAs(const double* source, std::size_t count, char* destination) {
  for (std::size_t i = 0; i < count; ++i) {
    const T value = static_cast<T>(source[i]);
    std::memcpy(destination + i * sizeof(T), &value, sizeof(T));
  }
}

}  // namespace

std::size_t ElementSize(ElementType type) { return Row(type).size; }

const char* SafetensorsName(ElementType type) { return Row(type).safetensors; }

std::optional<ElementType> FromSafetensorsName(const std::string& name) {
  for (const TypeRow& row : kTypes) {
    if (name == row.safetensors) return row.type;
  }
  return std::nullopt;
}

const char* KserveName(ElementType type) { return Row(type).kserve; }

std::optional<ElementType> FromKserveName(const std::string& name) {
  for (const TypeRow& row : kTypes) {
    if (row.kserve != nullptr && name == row.kserve) return row.type;
  }
  return std::nullopt;
}

double DecodeFp16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const double magnitude = mantissa * 0x1p-24;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide_exponent = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

double DecodeBf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

double DecodeFp8E4m3(std::uint8_t bits) {
  static const std::array<double, 256> table = MakeFp8Table();
  return table[bits];
}

std::uint16_t EncodeFp16(double value) {
  return static_cast<std::uint16_t>(EncodeSmallFloat(value, kFp16));
}

std::uint16_t EncodeBf16(double value) {
  // To fp32 with round-to-odd, so that the second rounding, to bf16, cannot err.
  float narrow = static_cast<float>(value);
  std::uint32_t bits = std::bit_cast<std::uint32_t>(narrow);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  if (std::isfinite(narrow) && static_cast<double>(narrow) != value) {
    if (std::fabs(static_cast<double>(narrow)) > std::fabs(value)) --bits;
    bits |= 1u;
  }
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::uint8_t EncodeFp8E4m3(double value) {
  return static_cast<std::uint8_t>(EncodeSmallFloat(value, kFp8E4m3));
}

bool IsConvertible(ElementType type) {
  switch (type) {
    case ElementType::kF8E4m3:
    case ElementType::kF16:
    case ElementType::kBf16:
    case ElementType::kF32:
    case ElementType::kF64:
    case ElementType::kI32:
    case ElementType::kI64:
      return true;
    default:
      return false;
  }
}

void DecodeToDouble(ElementType type, const char* source, std::size_t count, double* destination) {
  switch (type) {
    case ElementType::kF8E4m3:
      for (std::size_t i = 0; i < count; ++i) {
        destination[i] = DecodeFp8E4m3(static_cast<std::uint8_t>(source[i]));
      }
      return;
    case ElementType::kF16:
    case ElementType::kBf16:
      for (std::size_t i = 0; i < count; ++i) {
        std::uint16_t bits;
        std::memcpy(&bits, source + i * 2, 2);
        destination[i] = type == ElementType::kF16 ? DecodeFp16(bits) : DecodeBf16(bits);
      }
      return;
    case ElementType::kF32:
      return DecodeAs<float>(source, count, destination);
    case ElementType::kF64:
      return DecodeAs<double>(source, count, destination);
    case ElementType::kI32:
      return DecodeAs<std::int32_t>(source, count, destination);
    case ElementType::kI64:
      return DecodeAs<std::int64_t>(source, count, destination);
    default:
      return;
  }
}

void EncodeFromDouble(ElementType type, const double* source, std::size_t count,
                      char* destination) {
  switch (type) {
    case ElementType::kF8E4m3:
      for (std::size_t i = 0; i < count; ++i) {
        destination[i] = static_cast<char>(EncodeFp8E4m3(source[i]));
      }
      return;
    case ElementType::kF16:
    case ElementType::kBf16:
      for (std::size_t i = 0; i < count; ++i) {
        const std::uint16_t bits =
            type == ElementType::kF16 ? EncodeFp16(source[i]) : EncodeBf16(source[i]);
        std::memcpy(destination + i * 2, &bits, 2);
      }
      return;
    case ElementType::kF32:
      return EncodeAs<float>(source, count, destination);
    case ElementType::kF64:
      return EncodeAs<double>(source, count, destination);
    case ElementType::kI32:
      return EncodeAs<std::int32_t>(source, count, destination);
    case ElementType::kI64:
      return EncodeAs<std::int64_t>(source, count, destination);
    default:
      return;
  }
}

}  // namespace epserve::client
