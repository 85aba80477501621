// Random numbers that host and device make alike, each from its index: the reference of a sampled
// row makes again only the weights that it needs.
#ifndef EPSERVE_RUNTIME_MICROBENCH_BENCH_RANDOM_H_
#define EPSERVE_RUNTIME_MICROBENCH_BENCH_RANDOM_H_

#include <cstdint>

#include "runtime/base/host_device.h"

namespace epserve::runtime {

// Uniform in [-1, 1), a multiple of 2^-23: SplitMix64 of the stream's seed and the index.
EPS_HOST_DEVICE inline float RandomUnit(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<float>(static_cast<std::int32_t>(z >> 40) - (1 << 23)) * 0x1p-23f;
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_BENCH_RANDOM_H_
