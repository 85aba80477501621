#include "runtime/symmetric/shared_flag.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
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

// The flags' values at one look.
using Seen = std::array<std::uint64_t, kMostAwaitedFlags>;

std::uint32_t* FutexWord(SharedFlag* flag) {
  return reinterpret_cast<std::uint32_t*>(&flag->value);
}

void SleepOnFlag(SharedFlag* flag, std::uint64_t seen, std::chrono::nanoseconds duration) {
  timespec timeout{};
  timeout.tv_nsec = duration.count();  // Below a second: it is a slice.
  // Without FUTEX_PRIVATE_FLAG: the word is known by its page, so it works across processes.
  ::syscall(SYS_futex, FutexWord(flag), FUTEX_WAIT, static_cast<std::uint32_t>(seen), &timeout,
            nullptr, 0);
}

// Sleeps until woken, for `duration` at most, or not at all if a word is not what was `seen` any
// more. The callers look at the flags again whatever the reason, so the result is of no use to
// them.
void SleepOnFlags(std::span<SharedFlag* const> flags, const Seen& seen,
                  std::chrono::nanoseconds duration) {
  if (flags.size() == 1) return SleepOnFlag(flags[0], seen[0], duration);
  std::array<futex_waitv, kMostAwaitedFlags> words{};
  for (std::size_t i = 0; i < flags.size(); ++i) {
    words[i].val = static_cast<std::uint32_t>(seen[i]);
    words[i].uaddr = reinterpret_cast<std::uintptr_t>(FutexWord(flags[i]));
    words[i].flags = FUTEX_32;
  }
  timespec end{};  // Unlike FUTEX_WAIT's it is a time, not a duration.
  ::clock_gettime(CLOCK_MONOTONIC, &end);
  constexpr std::int64_t kSecondNs = 1'000'000'000;
  const std::int64_t end_ns = end.tv_nsec + duration.count();
  end.tv_sec += end_ns / kSecondNs;
  end.tv_nsec = end_ns % kSecondNs;
  const long result =
      ::syscall(SYS_futex_waitv, words.data(), flags.size(), 0, &end, CLOCK_MONOTONIC);
  // Whatever else a kernel or a sandbox refuses it with: to come back at once would be to spin.
  const bool refused = result < 0 && errno != EAGAIN && errno != EINTR && errno != ETIMEDOUT;
  if (refused) SleepOnFlag(flags[0], seen[0], duration);
}

// Acquire: the payload is read after the flag, pairs with the store in Publish.
bool AnyReached(std::span<SharedFlag* const> flags, std::uint64_t value) {
  return std::any_of(flags.begin(), flags.end(), [value](const SharedFlag* flag) {
    return flag->value.load(std::memory_order_acquire) >= value;
  });
}

// Whether any flag is reached within `limits.busy`.
bool LookUntil(std::span<SharedFlag* const> flags, std::uint64_t value, const WaitLimits& limits) {
  if (limits.busy.count() == 0) return false;
  const auto end = std::min(std::chrono::steady_clock::now() + limits.busy, limits.deadline);
  while (std::chrono::steady_clock::now() < end &&
         limits.abort->load(std::memory_order_relaxed) == 0) {
    if (AnyReached(flags, value)) return true;
    CpuRelax();
  }
  return false;
}

}  // namespace

void Publish(SharedFlag* flag, std::uint64_t value) {
  // Release: payload first, pairs with the acquire in WaitForAny. Sequentially consistent: before
  // the look at `waiters`, pairs with the waiter's increment before its look at `value`.
  flag->value.store(value, std::memory_order_seq_cst);
  if (flag->waiters.load(std::memory_order_seq_cst) != 0) {
    ::syscall(SYS_futex, FutexWord(flag), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

WaitResult WaitForValue(SharedFlag* flag, std::uint64_t value, const WaitLimits& limits) {
  return WaitForAny({&flag, 1}, value, limits);
}

WaitResult WaitForAny(std::span<SharedFlag* const> flags, std::uint64_t value,
                      const WaitLimits& limits) {
  for (int round = 0; round < kSpinRounds; ++round) {
    if (AnyReached(flags, value)) return WaitResult::kReached;
    CpuRelax();
  }
  if (LookUntil(flags, value, limits)) return WaitResult::kReached;
  // Before the look at `value`, pairs with the publisher's look at `waiters` after its store.
  for (SharedFlag* const flag : flags) flag->waiters.fetch_add(1, std::memory_order_seq_cst);
  WaitResult result = WaitResult::kReached;
  Seen seen;
  while (true) {
    bool reached = false;
    for (std::size_t i = 0; i < flags.size(); ++i) {
      // Acquire as above; sequentially consistent against a lost wake-up.
      seen[i] = flags[i]->value.load(std::memory_order_seq_cst);
      reached = reached || seen[i] >= value;
    }
    if (reached) break;
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
    SleepOnFlags(flags, seen, std::min<std::chrono::nanoseconds>(left, kSleepSlice));
  }
  // Relaxed: a publisher that still sees the count makes one needless call.
  for (SharedFlag* const flag : flags) flag->waiters.fetch_sub(1, std::memory_order_relaxed);
  return result;
}

}  // namespace epserve::runtime
