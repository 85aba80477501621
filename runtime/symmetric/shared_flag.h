// A counter in shared memory that one process raises and others wait for, with a deadline and an
// abort word. Waiters spin for a moment and then sleep in the kernel, because there are machines
// with fewer cores than workers. Values only grow; a flag is never reset.
//
// Ordering, stated once for all users:
//   Publish stores `value` with release or stronger: every ordinary store the publisher made before
//   is visible to whoever sees the value. Pairs with the acquire in WaitForAny. (Non-temporal
//   stores are not ordinary: end them with a store fence first, as streamed_copy.h does.)
//   `value` and `waiters` are both sequentially consistent, because each side writes one and then
//   reads the other: either the publisher sees the waiter and wakes it, or the waiter sees the
//   value.
// Thread safety: any number of waiters, one publisher at a time.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_SHARED_FLAG_H_
#define EPSERVE_RUNTIME_SYMMETRIC_SHARED_FLAG_H_

#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

namespace epserve::runtime {

// One cache line, so that a waiter on one flag is not disturbed by its neighbours. All bits zero is
// the initial state, which fresh shared memory has.
struct alignas(64) SharedFlag {
  std::atomic<std::uint64_t> value{0};    // Its low half is the futex word.
  std::atomic<std::uint32_t> waiters{0};  // Sleepers; a killed one only costs its publisher a call.
};
static_assert(sizeof(SharedFlag) == 64);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "flags cross process borders");
static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "flags cross process borders");
static_assert(sizeof(std::atomic<std::uint64_t>) == 8);
static_assert(std::endian::native == std::endian::little, "the futex word is the low half");

// Raises the flag to `value` and wakes its waiters. REQUIRES: `value` exceeds the present one.
void Publish(SharedFlag* flag, std::uint64_t value);

enum class WaitResult { kReached, kTimedOut, kAborted };

struct WaitLimits {
  std::chrono::steady_clock::time_point deadline;
  // Nonzero ends the wait within a few milliseconds. Never null.
  const std::atomic<std::uint32_t>* abort = nullptr;
  std::chrono::nanoseconds busy{0};  // looked for so long before a sleep
};

// Returns once the flag is `value` or more. A flag that has been reached wins over the abort word,
// and that over the deadline.
WaitResult WaitForValue(SharedFlag* flag, std::uint64_t value, const WaitLimits& limits);

inline constexpr std::size_t kMostAwaitedFlags = 64;

// The same for whichever of the flags is reached first. Where the system has no call for that
// (Linux has one from 5.16 on, which a container may yet refuse), the first flag's publisher wakes
// the waiter, and the others are seen within a few milliseconds.
// REQUIRES: at least one flag and at most kMostAwaitedFlags.
WaitResult WaitForAny(std::span<SharedFlag* const> flags, std::uint64_t value,
                      const WaitLimits& limits);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_SHARED_FLAG_H_
