#include "runtime/symmetric/shared_flag.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <ctime>

namespace epserve::runtime {
namespace {

// About 2 us: what a flag takes from core to core, and less than a sleep and a wake-up cost.
constexpr int kSpinRounds = 64;
// The longest that an abort, or a publisher that died between store and wake, goes unseen.
constexpr std::chrono::nanoseconds kSleepSlice = std::chrono::milliseconds(5);

inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::uint32_t* FutexWord(SharedFlag* flag) {
  return reinterpret_cast<std::uint32_t*>(&flag->value);
}

// Sleeps until woken, for `duration` at most, or not at all if the word is not `seen` any more.
// The callers look at the flag again whatever the reason, so the result is of no use to them.
void SleepOnFlag(SharedFlag* flag, std::uint64_t seen, std::chrono::nanoseconds duration) {
  timespec timeout{};
  timeout.tv_nsec = duration.count();  // Below a second: it is a slice.
  // Without FUTEX_PRIVATE_FLAG: the word is known by its page, so it works across processes.
  ::syscall(SYS_futex, FutexWord(flag), FUTEX_WAIT, static_cast<std::uint32_t>(seen), &timeout,
            nullptr, 0);
}

// Whether the flag is reached within `limits.busy`.
bool LookUntil(SharedFlag* flag, std::uint64_t value, const WaitLimits& limits) {
  if (limits.busy.count() == 0) return false;
  const auto end = std::min(std::chrono::steady_clock::now() + limits.busy, limits.deadline);
  while (std::chrono::steady_clock::now() < end &&
         limits.abort->load(std::memory_order_relaxed) == 0) {
    // Acquire, as in WaitForValue.
    if (flag->value.load(std::memory_order_acquire) >= value) return true;
    CpuRelax();
  }
  return false;
}

}  // namespace

void Publish(SharedFlag* flag, std::uint64_t value) {
  // Release: payload first, pairs with the acquire in WaitForValue. Sequentially consistent: before
  // the look at `waiters`, pairs with the waiter's increment before its look at `value`.
  flag->value.store(value, std::memory_order_seq_cst);
  if (flag->waiters.load(std::memory_order_seq_cst) != 0) {
    ::syscall(SYS_futex, FutexWord(flag), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

WaitResult WaitForValue(SharedFlag* flag, std::uint64_t value, const WaitLimits& limits) {
  for (int round = 0; round < kSpinRounds; ++round) {
    // Acquire: the payload is read after the flag, pairs with the store in Publish.
    if (flag->value.load(std::memory_order_acquire) >= value) return WaitResult::kReached;
    CpuRelax();
  }
  if (LookUntil(flag, value, limits)) return WaitResult::kReached;
  // Before the look at `value`, pairs with the publisher's look at `waiters` after its store.
  flag->waiters.fetch_add(1, std::memory_order_seq_cst);
  WaitResult result = WaitResult::kReached;
  while (true) {
    // Acquire as above; sequentially consistent against a lost wake-up.
    const std::uint64_t seen = flag->value.load(std::memory_order_seq_cst);
    if (seen >= value) break;
    // Relaxed: the word orders nothing, it only ends the wait.
    if (limits.abort->load(std::memory_order_relaxed) != 0) {
      result = WaitResult::kAborted;
      break;
    }
    const auto left = limits.deadline - std::chrono::steady_clock::now();
    if (left <= std::chrono::nanoseconds::zero()) {
      result = WaitResult::kTimedOut;
      break;
    }
    SleepOnFlag(flag, seen, std::min<std::chrono::nanoseconds>(left, kSleepSlice));
  }
  // Relaxed: a publisher that still sees the count makes one needless call.
  flag->waiters.fetch_sub(1, std::memory_order_relaxed);
  return result;
}

}  // namespace epserve::runtime
