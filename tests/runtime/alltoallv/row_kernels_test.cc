#include "runtime/alltoallv/row_kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace epserve::runtime {
namespace {

class SumRowsTest : public testing::TestWithParam<DataType> {};

TEST_P(SumRowsTest, SumsInOrderInFp32AndRoundsOnceWhateverTheLength) {
  const DataType type = GetParam();
  std::mt19937 random(5);
  std::uniform_real_distribution<float> value(-4.0f, 4.0f);
  for (const std::size_t count : {1u, 3u, 31u, 512u, 513u, 1100u}) {
    for (std::size_t num_rows = 0; num_rows < 9; ++num_rows) {
      std::vector<std::vector<std::byte>> rows(num_rows);
      std::vector<const std::byte*> pointers;
      std::vector<float> values(count);
      std::vector<float> expected(count, 0.0f);
      for (std::size_t r = 0; r < num_rows; ++r) {
        rows[r].resize(count * DataTypeBytes(type));
        for (float& v : values) v = value(random);
        ConvertFromFloat(type, values.data(), rows[r].data(), count);
        ConvertToFloat(type, rows[r].data(), values.data(), count);
        for (std::size_t i = 0; i < count; ++i) {
          expected[i] = r == 0 ? values[i] : expected[i] + values[i];
        }
        pointers.push_back(rows[r].data());
      }
      std::vector<std::byte> expected_out(count * DataTypeBytes(type));
      ConvertFromFloat(type, expected.data(), expected_out.data(), count);
      for (const CopyKind kind : {CopyKind::kCached, CopyKind::kStreamed}) {
        std::vector<std::byte> out(count * DataTypeBytes(type) + 8, std::byte{0xa5});
        SumRows(type, kind, pointers, out.data(), count);
        FenceStreamedCopies();
        ASSERT_EQ(std::memcmp(out.data(), expected_out.data(), expected_out.size()), 0)
            << count << " x " << num_rows;
        for (std::size_t i = expected_out.size(); i < out.size(); ++i) {
          ASSERT_EQ(out[i], std::byte{0xa5});
        }
      }
    }
  }
}

// Every bf16 there is, in both halves of a pair, with others of every kind.
TEST(SumRowsBf16Test, EveryBitPatternIsRoundedAsOneByOne) {
  constexpr std::size_t kPatterns = 1 << 16;
  std::vector<std::uint16_t> all(kPatterns + 1);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  std::mt19937 random(11);
  std::vector<std::uint16_t> others[3];
  for (int round = 0; round < 8; ++round) {
    for (std::vector<std::uint16_t>& other : others) {
      other.resize(all.size());
      for (std::uint16_t& bits : other) bits = static_cast<std::uint16_t>(random());
    }
    others[0][0] = 0x7f80;  // Infinite, NaN, the smallest there is.
    others[0][1] = 0x7fc1;
    others[0][2] = 1;
    const int odd = round % 2;
    for (std::size_t num_rows = 2; num_rows <= 4; ++num_rows) {
      std::vector<const std::byte*> rows = {reinterpret_cast<const std::byte*>(all.data() + odd)};
      for (std::size_t r = 1; r < num_rows; ++r) {
        rows.push_back(reinterpret_cast<const std::byte*>(others[r - 1].data() + odd));
      }
      std::vector<std::uint16_t> out(kPatterns);
      SumRows(DataType::kBf16, CopyKind::kCached, rows, reinterpret_cast<std::byte*>(out.data()),
              kPatterns);
      for (std::size_t i = 0; i < kPatterns; ++i) {
        float sum = Bf16ToFloat(all[i + odd]);
        for (std::size_t r = 1; r < num_rows; ++r) sum += Bf16ToFloat(others[r - 1][i + odd]);
        if (std::isnan(sum)) {  // Which of several NaNs it is, the compiler's order says.
          ASSERT_TRUE(std::isnan(Bf16ToFloat(out[i]))) << i << " of " << num_rows << " rows";
        } else {
          ASSERT_EQ(out[i], FloatToBf16(sum)) << i << " of " << num_rows << " rows";
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, SumRowsTest,
                         testing::Values(DataType::kFp32, DataType::kFp16, DataType::kBf16));

}  // namespace
}  // namespace epserve::runtime
