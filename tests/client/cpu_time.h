// How long something computes, whoever else uses the machine meanwhile.
#ifndef EPSERVE_TESTS_CLIENT_CPU_TIME_H_
#define EPSERVE_TESTS_CLIENT_CPU_TIME_H_

#include <time.h>

#include <algorithm>

namespace epserve::client {

inline double ThreadCpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The least of three runs of `work`, which is what it takes by itself.
template <typename Work>
double LeastCpuSeconds(Work work) {
  double least = 1e9;
  for (int run = 0; run < 3; ++run) {
    const double began = ThreadCpuSeconds();
    work();
    least = std::min(least, ThreadCpuSeconds() - began);
  }
  return least;
}

}  // namespace epserve::client

#endif  // EPSERVE_TESTS_CLIENT_CPU_TIME_H_
