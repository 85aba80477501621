// What all requests together may hold of memory: messages, outputs and replies that their callers
// have yet to take. Bounds on one stream or one connection do not bound their sum. Whoever does not
// take replies, and opens calls anew as they are ended, would keep all others out: so replies
// that wait for their callers make room for newcomers, the oldest first. Thread-safe.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MEMORY_BUDGET_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MEMORY_BUDGET_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <optional>

#include "absl/status/status.h"

namespace epserve::coordinator {

class MemoryBudget {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  using Now = TimePoint (*)();

  // A reply that has waited for less is left alone. Its caller may be taking it, as fast as the
  // link goes: the default of --max-held-bytes, full of replies, takes 4 s over 10 Gbit/s, and
  // whoever gave up the oldest of them sooner would give up those that are nearly there.
  static constexpr std::chrono::milliseconds kLeastWait{10000};

  explicit MemoryBudget(std::int64_t max_bytes, Now now = std::chrono::steady_clock::now)
      : max_bytes_(max_bytes), now_(now) {}
  MemoryBudget(const MemoryBudget&) = delete;
  MemoryBudget& operator=(const MemoryBudget&) = delete;

  // One request's part, given back when it goes; the budget outlives it. One thread at a time may
  // use it; that it is given up is safe beside that.
  class Share {
   public:
    explicit Share(MemoryBudget& budget) : budget_(budget) {}
    Share(Share&& other) noexcept;  // REQUIRES: the other does not wait.
    Share& operator=(Share&&) = delete;
    ~Share() { Release(); }

    // RESOURCE_EXHAUSTED: the others hold too much for so many bytes more, and would even if all
    // replies were given up that may be. What nobody else holds anything beside is let through, so
    // that no request is refused for ever. REQUIRES: it does not wait.
    absl::Status Grow(std::int64_t bytes);

    // From now on it is a reply's that its caller may take. Where a newcomer needs the room the
    // share is emptied and `give_up` called, once and before Release() returns, which whatever
    // `give_up` uses must outlive. It must neither block nor use the budget.
    void AwaitCaller(std::function<void()> give_up);

    void Release();

    // A part of it, to be given back by itself. REQUIRES: it has so many, and does not wait.
    Share Split(std::int64_t bytes);

   private:
    friend class MemoryBudget;

    MemoryBudget& budget_;
    std::int64_t bytes_ = 0;  // Guarded by the budget's mutex, as the rest.
    std::function<void()> give_up_;
    TimePoint waits_since_;
    std::optional<std::list<Share*>::iterator> place_;  // among those that wait
  };

  std::int64_t held_bytes() const {
    const std::lock_guard lock(mutex_);
    return held_bytes_;
  }

 private:
  // Gives up replies until `bytes` more have room beside the others of one that has `own`. False,
  // and nothing is given up, where there are too few.
  bool MakeRoom(std::int64_t bytes, std::int64_t own);
  bool HasRoom(std::int64_t bytes, std::int64_t own, std::int64_t held) const {
    return held == own || held + bytes <= max_bytes_;
  }
  void StopWaiting(Share* share);

  const std::int64_t max_bytes_;
  const Now now_;
  mutable std::mutex mutex_;
  std::int64_t held_bytes_ = 0;  // Guarded by mutex_, as the next.
  std::list<Share*> waiting_;    // longest first
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MEMORY_BUDGET_H_
