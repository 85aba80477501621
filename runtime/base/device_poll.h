// How a thread of the host waits for the device: by looking again and again, so that it can stop.
#ifndef EPSERVE_RUNTIME_BASE_DEVICE_POLL_H_
#define EPSERVE_RUNTIME_BASE_DEVICE_POLL_H_

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace epserve::runtime {

// One wait, from its making on.
class DevicePoll {
 public:
  std::chrono::nanoseconds waited() const { return std::chrono::steady_clock::now() - start_; }

  // Between two looks. At first it only lets others run, for what a small batch takes altogether:
  // a sleep ends late by a wake-up, 30 us where cores have gone to sleep too. Then it sleeps an
  // eighth of what has been waited, so that a long wait is noticed late by that at most, and takes
  // a few per cent of a core.
  void Pause() const {
    constexpr std::chrono::nanoseconds kEager = std::chrono::microseconds(400);
    constexpr std::chrono::nanoseconds kLongest = std::chrono::microseconds(200);
    const std::chrono::nanoseconds so_far = waited();
    if (so_far < kEager) {
      std::this_thread::yield();
    } else {
      SleepToTheMicrosecond();
      std::this_thread::sleep_for(std::min(so_far / 8, kLongest));
    }
  }

 private:
  // Linux lets a thread's sleeps be 50 us late otherwise, to end several at once.
  static void SleepToTheMicrosecond() {
    constexpr unsigned long kSlackNs = 1000;
    thread_local const int set = ::prctl(PR_SET_TIMERSLACK, kSlackNs);
    (void)set;
  }

  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_DEVICE_POLL_H_
