// The machine's steady clock (CLOCK_MONOTONIC): one for all processes of a machine. Thread-safe.
#ifndef EPSERVE_SERVER_WORKER_CLOCK_H_
#define EPSERVE_SERVER_WORKER_CLOCK_H_

#include <chrono>
#include <cstdint>

#include "absl/time/time.h"

namespace epserve::worker {

inline std::int64_t SteadyNowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline std::int64_t SteadyNowUs() { return SteadyNowNs() / 1000; }

// As a time point, `delay` from now.
inline std::chrono::steady_clock::time_point After(absl::Duration delay) {
  return std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(delay);
}

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_CLOCK_H_
