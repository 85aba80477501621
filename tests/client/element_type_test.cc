#include "client/cpp/element_type.h"

#include <bit>
#include <cmath>
#include <limits>

#include "gtest/gtest.h"

namespace epserve::client {
namespace {

TEST(ElementTypeTest, NamesOfBothProtocolsComeBack) {
  for (int i = 0; i <= static_cast<int>(ElementType::kU64); ++i) {
    const auto type = static_cast<ElementType>(i);
    EXPECT_EQ(FromSafetensorsName(SafetensorsName(type)), type);
    if (KserveName(type) != nullptr) {
      EXPECT_EQ(FromKserveName(KserveName(type)), type);
    }
  }
  EXPECT_FALSE(FromSafetensorsName("F31"));
  EXPECT_FALSE(FromKserveName(""));
}

TEST(ElementTypeTest, EveryFp16SurvivesDecodeAndEncode) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = DecodeFp16(static_cast<std::uint16_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(EncodeFp16(value), bits);
  }
}

TEST(ElementTypeTest, EveryBf16SurvivesDecodeAndEncode) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = DecodeBf16(static_cast<std::uint16_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(EncodeBf16(value), bits);
  }
}

TEST(ElementTypeTest, EveryFp8SurvivesDecodeAndEncode) {
  for (std::uint32_t bits = 0; bits < 0x100; ++bits) {
    const double value = DecodeFp8E4m3(static_cast<std::uint8_t>(bits));
    if (std::isnan(value)) {
      EXPECT_EQ(bits & 0x7f, 0x7fu);
      continue;
    }
    ASSERT_EQ(EncodeFp8E4m3(value), bits);
  }
}

TEST(ElementTypeTest, KnownValuesOfEachFormat) {
  EXPECT_EQ(DecodeFp16(0x3c00), 1.0);
  EXPECT_EQ(DecodeFp16(0x0001), 0x1p-24);
  EXPECT_EQ(DecodeFp16(0x7bff), 65504.0);
  EXPECT_TRUE(std::isinf(DecodeFp16(0x7c00)));
  EXPECT_EQ(DecodeBf16(0x3f80), 1.0);
  EXPECT_EQ(DecodeBf16(0xc000), -2.0);
  EXPECT_EQ(DecodeFp8E4m3(0x38), 1.0);
  EXPECT_EQ(DecodeFp8E4m3(0x7e), 448.0);
  EXPECT_EQ(DecodeFp8E4m3(0x01), 0x1p-9);
  EXPECT_EQ(DecodeFp8E4m3(0x08), 0x1p-6);
}

TEST(ElementTypeTest, HalfwayRoundsToEven) {
  EXPECT_EQ(EncodeFp16(1.0 + 0x1p-11), 0x3c00);
  EXPECT_EQ(EncodeFp16(1.0 + 3 * 0x1p-11), 0x3c02);
  EXPECT_EQ(EncodeBf16(1.0 + 0x1p-8), 0x3f80);
  EXPECT_EQ(EncodeBf16(1.0 + 3 * 0x1p-8), 0x3f82);
  // Just above halfway, by less than fp32 can tell: rounding twice would go down.
  EXPECT_EQ(EncodeBf16(1.0 + 0x1p-8 + 0x1p-40), 0x3f81);
  EXPECT_EQ(EncodeFp8E4m3(1.0 + 0x1p-4), 0x38);
  EXPECT_EQ(EncodeFp8E4m3(1.0 + 3 * 0x1p-4), 0x3a);
}

TEST(ElementTypeTest, OverflowSaturatesOrBecomesInfinity) {
  EXPECT_EQ(EncodeFp16(65520.0), 0x7c00);
  EXPECT_EQ(EncodeFp16(65519.0), 0x7bff);
  EXPECT_EQ(EncodeFp8E4m3(1e9), 0x7e);
  EXPECT_EQ(EncodeFp8E4m3(-1e9), 0xfe);
  EXPECT_EQ(EncodeBf16(1e300), 0x7f80);
  EXPECT_TRUE(std::isnan(DecodeFp16(EncodeFp16(std::nan("")))));
  EXPECT_TRUE(std::isnan(DecodeBf16(EncodeBf16(std::nan("")))));
  EXPECT_TRUE(std::isnan(DecodeFp8E4m3(EncodeFp8E4m3(std::nan("")))));
}

TEST(ElementTypeTest, ConversionWorksAtAnyAlignment) {
  for (const ElementType type : {ElementType::kF16, ElementType::kBf16, ElementType::kF32,
                                 ElementType::kF64, ElementType::kI32, ElementType::kI64}) {
    const double values[] = {1, -2, 64};
    char bytes[1 + 3 * 8];
    EncodeFromDouble(type, values, 3, bytes + 1);
    double back[3] = {};
    DecodeToDouble(type, bytes + 1, 3, back);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(back[i], values[i]) << SafetensorsName(type);
  }
}

}  // namespace
}  // namespace epserve::client
