#include "runtime/experts/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace epserve::runtime {
namespace {

TEST(SwiGluTest, WholeRangeMatchesDoubleReference) {
  std::vector<float> gate, up;
  for (double x = -86.0; x <= 200.0; x += 0.0137) {
    gate.push_back(static_cast<float>(x));
    up.push_back(1.25f);
  }
  const std::vector<float> in = gate;
  SwiGlu(gate.data(), up.data(), gate.size());
  for (std::size_t i = 0; i < in.size(); ++i) {
    const double x = in[i];
    const double want = x / (1.0 + std::exp(-x)) * 1.25;
    EXPECT_NEAR(gate[i], want, std::abs(want) * 4e-7) << x;
  }
}

TEST(SwiGluTest, FarNegativeIsAboutZeroAndFarPositiveIsItself) {
  std::vector<float> gate = {-1000.0f, -3e38f, 1000.0f, 3e38f, 0.0f};
  const std::vector<float> up(gate.size(), 1.0f);
  SwiGlu(gate.data(), up.data(), gate.size());
  EXPECT_NEAR(gate[0], 0.0f, 1e-30);
  EXPECT_TRUE(std::isfinite(gate[1]));
  EXPECT_EQ(gate[2], 1000.0f);
  EXPECT_EQ(gate[3], 3e38f);
  EXPECT_EQ(gate[4], 0.0f);
}

TEST(SwiGluTest, NanStaysInItsPlace) {
  std::vector<float> gate(67, 1.0f);
  const std::vector<float> up(gate.size(), 1.0f);
  gate[33] = std::numeric_limits<float>::quiet_NaN();
  SwiGlu(gate.data(), up.data(), gate.size());
  for (std::size_t i = 0; i < gate.size(); ++i) EXPECT_EQ(std::isnan(gate[i]), i == 33) << i;
}

}  // namespace
}  // namespace epserve::runtime
