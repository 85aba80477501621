#include "runtime/base/dtype.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace epserve::runtime {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The value of sign, exponent and mantissa bits, computed by ldexp: apart from the code under test.
double PlainValue(std::uint32_t bits, int exponent_bits, int mantissa_bits, int bias) {
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
  const double sign = (bits >> (mantissa_bits + exponent_bits)) != 0 ? -1.0 : 1.0;
  const double magnitude = exponent == 0
                               ? std::ldexp(static_cast<double>(mantissa), 1 - bias - mantissa_bits)
                               : std::ldexp(static_cast<double>(mantissa | (1u << mantissa_bits)),
                                            exponent - bias - mantissa_bits);
  return sign * magnitude;
}

// Holds `narrow` to what a search over all finite values of the type gives: the nearest, and of two
// as near the one with an even last bit. `values` are those of the non-negative bit patterns,
// ascending, so that a pattern is its index.
template <typename Narrow>
void ExpectNearestEven(const std::vector<double>& values, double value, Narrow narrow) {
  const auto bits = static_cast<std::size_t>(narrow(static_cast<float>(value)));
  ASSERT_LT(bits, values.size()) << value;
  const double error = std::fabs(values[bits] - value);
  for (const std::size_t other : {bits - 1, bits + 1}) {
    if (other >= values.size()) continue;  // Also what bits - 1 wraps to.
    const double other_error = std::fabs(values[other] - value);
    ASSERT_LE(error, other_error) << value;
    ASSERT_TRUE(error < other_error || bits % 2 == 0) << value << " is a tie";
  }
}

template <typename Bits>
void ExpectFoundAsConverted(DataType type) {
  constexpr int kBits = 8 * sizeof(Bits);
  for (std::uint32_t pattern = 0; pattern < (1u << std::min(kBits, 16)); ++pattern) {
    // Of fp32 the upper half: sign, exponent and the first of the mantissa.
    const auto bits = static_cast<Bits>(pattern << (kBits > 16 ? 16 : 0));
    float value = 0;
    ConvertToFloat(type, &bits, &value, 1);
    ASSERT_EQ(FindNonFinite(type, &bits, 1), std::isfinite(value) ? 1u : 0u) << pattern;
  }
  // Wherever it stands, and the first where there are more.
  std::vector<Bits> many(20'000, Bits{0});
  EXPECT_EQ(FindNonFinite(type, many.data(), many.size()), many.size());
  std::mt19937 random(7);
  for (int i = 0; i < 200; ++i) {
    std::vector<Bits> some = many;
    const std::size_t first = random() % some.size();
    some.back() = some[first] = static_cast<Bits>(-1);  // NaN in every type.
    ASSERT_EQ(FindNonFinite(type, some.data(), some.size()), first);
  }
  EXPECT_EQ(FindNonFinite(type, nullptr, 0), 0u);
}

TEST(FindNonFiniteTest, EveryTypesNanAndInfAreFound) {
  ExpectFoundAsConverted<std::uint32_t>(DataType::kFp32);
  ExpectFoundAsConverted<std::uint16_t>(DataType::kFp16);
  ExpectFoundAsConverted<std::uint16_t>(DataType::kBf16);
  ExpectFoundAsConverted<std::uint8_t>(DataType::kFp8E4m3);
  // NaN whose mantissa is in its last bits alone.
  const std::uint32_t nan = 0x7f800001u;
  EXPECT_EQ(FindNonFinite(DataType::kFp32, &nan, 1), 0u);
}

TEST(Fp16Test, EveryBitPatternHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = Fp16ToFloat(half);
    const std::uint32_t magnitude = bits & 0x7fff;
    if (magnitude > 0x7c00) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_GT(FloatToFp16(value) & 0x7fff, 0x7c00) << bits;
      continue;
    }
    if (magnitude == 0x7c00) {
      ASSERT_EQ(value, bits < 0x8000 ? kInf : -kInf);
    } else {
      ASSERT_EQ(value, PlainValue(bits, 5, 10, 15)) << bits;
    }
    ASSERT_EQ(std::signbit(value), bits >= 0x8000) << bits;
    ASSERT_EQ(FloatToFp16(value), half);
  }
}

TEST(Fp16Test, ValuesBetweenRoundToNearestEven) {
  std::vector<double> values;
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) values.push_back(PlainValue(bits, 5, 10, 15));
  for (std::size_t i = 0; i + 1 < values.size(); ++i) {
    const double middle = (values[i] + values[i + 1]) / 2;
    ExpectNearestEven(values, middle, FloatToFp16);
    ExpectNearestEven(values, std::nextafterf(static_cast<float>(middle), 0.0f), FloatToFp16);
    ExpectNearestEven(values, std::nextafterf(static_cast<float>(middle), kInf), FloatToFp16);
  }
}

TEST(Fp16Test, ValuesPastTheLargestBecomeInf) {
  EXPECT_EQ(FloatToFp16(65504.0f), 0x7bff);
  EXPECT_EQ(FloatToFp16(std::nextafterf(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(FloatToFp16(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToFp16(-1e30f), 0xfc00);
  EXPECT_EQ(FloatToFp16(kInf), 0x7c00);
  EXPECT_EQ(FloatToFp16(-0.0f), 0x8000);
}

TEST(Bf16Test, EveryBitPatternComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto narrow = static_cast<std::uint16_t>(bits);
    const float value = Bf16ToFloat(narrow);
    ASSERT_EQ(std::bit_cast<std::uint32_t>(value), bits << 16);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(value)))) << bits;
    } else {
      ASSERT_EQ(FloatToBf16(value), narrow);
    }
  }
}

TEST(Bf16Test, ValuesBetweenRoundToNearestEven) {
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // A tie: down to even.
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);  // A tie: up to even.
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f817fffu)), 0x3f81);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7f80);  // Rounds up to Inf.
}

TEST(Bf16Test, NanWhosePayloadIsInTheLowBitsStaysNan) {
  const float value = std::bit_cast<float>(0x7f800001u);
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(value))));
}

TEST(Fp8Test, EveryBitPatternHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x100; ++bits) {
    const auto narrow = static_cast<std::uint8_t>(bits);
    const float value = Fp8E4m3ToFloat(narrow);
    if ((bits & 0x7f) == 0x7f) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_EQ(FloatToFp8E4m3(value) & 0x7f, 0x7f);
      continue;
    }
    ASSERT_EQ(value, PlainValue(bits, 4, 3, 7)) << bits;
    ASSERT_EQ(FloatToFp8E4m3(value), narrow);
  }
}

TEST(Fp8Test, ValuesBetweenRoundToNearestEvenAndSaturate) {
  std::vector<double> values;
  for (std::uint32_t bits = 0; bits < 0x7f; ++bits) values.push_back(PlainValue(bits, 4, 3, 7));
  for (std::size_t i = 0; i + 1 < values.size(); ++i) {
    const double middle = (values[i] + values[i + 1]) / 2;
    ExpectNearestEven(values, middle, FloatToFp8E4m3);
    ExpectNearestEven(values, std::nextafterf(static_cast<float>(middle), 0.0f), FloatToFp8E4m3);
    ExpectNearestEven(values, std::nextafterf(static_cast<float>(middle), kInf), FloatToFp8E4m3);
  }
  EXPECT_EQ(FloatToFp8E4m3(449.0f), 0x7e);
  EXPECT_EQ(FloatToFp8E4m3(-kInf), 0xfe);
  EXPECT_EQ(FloatToFp8E4m3(kNan) & 0x7f, 0x7f);
}

// Rows go through vectorised loops: every length must agree with the element's own function.
TEST(ConvertTest, RowsOfEveryLengthAgreeWithSingleElements) {
  std::mt19937 random(7);
  for (std::size_t count = 0; count < 100; ++count) {
    std::vector<float> source(count);
    for (float& value : source) value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    std::vector<std::uint16_t> narrow(count, 0xaaaa);
    std::vector<float> wide(count);
    ConvertFromFloat(DataType::kBf16, source.data(), narrow.data(), count);
    ConvertToFloat(DataType::kBf16, narrow.data(), wide.data(), count);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(narrow[i], FloatToBf16(source[i])) << i;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]), std::uint32_t{narrow[i]} << 16) << i;
    }
    ConvertFromFloat(DataType::kFp16, source.data(), narrow.data(), count);
    ConvertToFloat(DataType::kFp16, narrow.data(), wide.data(), count);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(narrow[i], FloatToFp16(source[i])) << i;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]),
                std::bit_cast<std::uint32_t>(Fp16ToFloat(narrow[i])))
          << i;
    }
    std::vector<std::uint8_t> bytes(count, 0xaa);
    ConvertFromFloat(DataType::kFp8E4m3, source.data(), bytes.data(), count);
    for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(bytes[i], FloatToFp8E4m3(source[i])) << i;
    ConvertToFloat(DataType::kFp8E4m3, bytes.data(), wide.data(), count);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]),
                std::bit_cast<std::uint32_t>(Fp8E4m3ToFloat(bytes[i])))
          << i;
    }
  }
}

TEST(DataTypeTest, SizesAndNamesAreThoseOfTheType) {
  EXPECT_EQ(DataTypeBytes(DataType::kFp32), 4u);
  EXPECT_EQ(DataTypeBytes(DataType::kFp16), 2u);
  EXPECT_EQ(DataTypeBytes(DataType::kBf16), 2u);
  EXPECT_EQ(DataTypeBytes(DataType::kFp8E4m3), 1u);
  EXPECT_EQ(DataTypeBytes(DataType::kInt64), 8u);
  EXPECT_EQ(DataTypeName(DataType::kBf16), "bf16");
  EXPECT_EQ(DataTypeName(DataType::kFp8E4m3), "fp8");
}

}  // namespace
}  // namespace epserve::runtime
