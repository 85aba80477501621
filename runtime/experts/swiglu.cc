#include "runtime/experts/swiglu.h"

#include <bit>
#include <cstdint>

#include "runtime/base/simd.h"

namespace epserve::runtime {

// exp() of the C library does not vectorise here without the flags that also let the compiler
// reorder sums, so it is written out: e^v = 2^n * e^r, with |r| <= ln(2) / 2 and e^r by its series
// to the seventh power (remainder below 5e-9).
EPS_MULTIVERSION void SwiGlu(float* gate, const float* up, std::size_t count) {
  constexpr float kLog2E = 1.44269504f;
  // ln(2) in two parts, the first short enough that n times it is exact.
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  constexpr float kLimit = 87.0f;  // Keeps 2^n a normal number; beyond it silu is x or about 0.
  for (std::size_t i = 0; i < count; ++i) {
    const float x = gate[i];
    float v = -x;
    v = v > kLimit ? kLimit : v;  // Comparisons with NaN are false, so NaN passes through.
    v = v < -kLimit ? -kLimit : v;
    const float shifted = v * kLog2E + kRound;
    const float n = shifted - kRound;
    const float r = (v - n * kLn2High) - n * kLn2Low;
    float series = 1.0f / 5040.0f;
    series = series * r + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const std::uint32_t exponent = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
    const float power = std::bit_cast<float>(exponent);
    gate[i] = x / (1.0f + series * power) * up[i];
  }
}

}  // namespace epserve::runtime
