// Whether a thread of the test's own process sleeps.
#ifndef EPSERVE_TESTS_SUPPORT_ASLEEP_H_
#define EPSERVE_TESTS_SUPPORT_ASLEEP_H_

#include <sys/types.h>

#include <fstream>
#include <iterator>
#include <string>

namespace epserve {

// Whether the kernel shows the thread of that number, as gettid() gives it, as sleeping.
inline bool IsAsleep(pid_t thread) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
  const std::string stat((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return stat.find(") S ") != std::string::npos;
}

}  // namespace epserve

#endif  // EPSERVE_TESTS_SUPPORT_ASLEEP_H_
