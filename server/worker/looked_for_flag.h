// A flag that one thread raises for another, which may look for it for a while before it goes to
// sleep over it in some other way. Looking costs a core, and saves the wake-up: some 40 us on a
// virtual machine whose cores have nothing else to do.
//
// Thread-safe. What was done before Raise() is seen after a LookFor() that returned true.
#ifndef EPSERVE_SERVER_WORKER_LOOKED_FOR_FLAG_H_
#define EPSERVE_SERVER_WORKER_LOOKED_FOR_FLAG_H_

#include <atomic>
#include <chrono>
#include <thread>

namespace epserve::worker {

class LookedForFlag {
 public:
  // Release: pairs with LookFor's acquire.
  void Raise() { raised_.store(true, std::memory_order_release); }
  void Lower() { raised_.store(false, std::memory_order_relaxed); }

  // Whether the flag is up, now or within `busy`. Lets other threads run in between, for looking
  // must not keep what is looked for from happening where cores are few.
  bool LookFor(std::chrono::nanoseconds busy) const {
    if (raised_.load(std::memory_order_acquire)) return true;
    if (busy.count() == 0) return false;
    const auto end = std::chrono::steady_clock::now() + busy;
    while (std::chrono::steady_clock::now() < end) {
      if (raised_.load(std::memory_order_acquire)) return true;
      std::this_thread::yield();
    }
    return false;
  }

 private:
  std::atomic<bool> raised_{false};
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_LOOKED_FOR_FLAG_H_
