#include "runtime/alltoallv/partial_sums.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

namespace epserve::runtime {
namespace {

constexpr int kRanks = 5;
constexpr std::int64_t kHidden = 37;
constexpr float kPoison = -77.0f;

// Tokens with any set of ranks, and their partial rows of whole numbers, whose sums are exact.
class SumReadyTokensTest : public testing::Test {
 protected:
  SumReadyTokensTest() {
    std::mt19937 random(9);
    for (int token = 0; token < 200; ++token) destinations_.push_back(random() % (1u << kRanks));
    for (const std::uint64_t destinations : destinations_) {
      for (int h = 0; h < kHidden; ++h) expected_.push_back(0.0f);
      for (std::uint64_t left = destinations; left != 0; left &= left - 1) {
        std::vector<float>& rows = rows_[std::countr_zero(left)];
        for (int h = 0; h < kHidden; ++h) {
          rows.push_back(static_cast<float>(random() % 1000));
          expected_[expected_.size() - kHidden + h] += rows.back();
        }
      }
    }
    out_.assign(expected_.size(), kPoison);
    sums_.dtype = DataType::kFp32;
    sums_.hidden = kHidden;
    sums_.token_destinations = destinations_;
    for (int rank = 0; rank < kRanks; ++rank) {
      sums_.rows[rank] = reinterpret_cast<const std::byte*>(rows_[rank].data());
    }
    sums_.out = reinterpret_cast<std::byte*>(out_.data());
  }

  // Whether the token's place holds its sum, or is as it was.
  bool IsSummed(std::size_t token) const {
    const float* const row = out_.data() + token * kHidden;
    const bool summed =
        std::memcmp(row, expected_.data() + token * kHidden, kHidden * sizeof(float)) == 0;
    if (!summed) {
      for (int h = 0; h < kHidden; ++h) EXPECT_EQ(row[h], kPoison) << "token " << token;
    }
    return summed;
  }

  std::vector<std::uint64_t> destinations_;
  std::vector<float> rows_[kRanks];
  std::vector<float> expected_;
  std::vector<float> out_;
  PartialSums sums_;
};

TEST_F(SumReadyTokensTest, TokensAreSummedOnceAllTheirRanksAreReadyAndNoOthersTouched) {
  for (const CopyKind kind : {CopyKind::kCached, CopyKind::kStreamed}) {
    sums_.kind = kind;
    std::fill(out_.begin(), out_.end(), kPoison);
    std::optional<std::uint64_t> before;
    for (const std::uint64_t ready : {0b00000, 0b00100, 0b10101, 0b11111}) {
      SumReadyTokens(sums_, ready, before);
      FenceStreamedCopies();
      before = ready;
      for (std::size_t token = 0; token < destinations_.size(); ++token) {
        EXPECT_EQ(IsSummed(token), (destinations_[token] & ~ready) == 0)
            << token << " with " << destinations_[token] << " of " << ready;
      }
    }
  }
}

TEST_F(SumReadyTokensTest, TokensThatWereSummedBeforeAreLeftAlone) {
  SumReadyTokens(sums_, 0b00111, std::nullopt);
  std::fill(out_.begin(), out_.end(), kPoison);
  SumReadyTokens(sums_, 0b01111, 0b00111);
  for (std::size_t token = 0; token < destinations_.size(); ++token) {
    const bool is_new = (destinations_[token] & ~0b01111u) == 0 && (destinations_[token] & 0b01000);
    EXPECT_EQ(IsSummed(token), is_new) << token;
  }
}

TEST_F(SumReadyTokensTest, AllAtOnceIsOneCall) {
  SumReadyTokens(sums_, ~std::uint64_t{0}, std::nullopt);
  EXPECT_EQ(out_, expected_);
}

}  // namespace
}  // namespace epserve::runtime
