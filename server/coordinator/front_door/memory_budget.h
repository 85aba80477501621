// What all requests together may hold of memory: messages, outputs and replies that their callers
// have yet to take. Bounds on one stream or one connection do not bound their sum. Thread-safe.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MEMORY_BUDGET_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MEMORY_BUDGET_H_

#include <cstdint>
#include <mutex>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace epserve::coordinator {

class MemoryBudget {
 public:
  explicit MemoryBudget(std::int64_t max_bytes) : max_bytes_(max_bytes) {}
  MemoryBudget(const MemoryBudget&) = delete;
  MemoryBudget& operator=(const MemoryBudget&) = delete;

  // One request's part, given back when it goes; the budget outlives it.
  class Share {
   public:
    explicit Share(MemoryBudget& budget) : budget_(budget) {}
    Share(Share&& other) noexcept
        : budget_(other.budget_), bytes_(std::exchange(other.bytes_, 0)) {}
    Share& operator=(Share&&) = delete;
    ~Share() { Release(); }

    // RESOURCE_EXHAUSTED: the others hold too much for so many bytes more. What nobody else holds
    // anything beside is let through, so that no request is refused for ever.
    absl::Status Grow(std::int64_t bytes) {
      const std::lock_guard lock(budget_.mutex_);
      const std::int64_t others = budget_.held_bytes_ - bytes_;
      if (others > 0 && budget_.held_bytes_ + bytes > budget_.max_bytes_) {
        return absl::ResourceExhaustedError(
            absl::StrCat("infer: ", bytes, " bytes beside the ", budget_.held_bytes_,
                         " that requests and replies hold exceed ", budget_.max_bytes_,
                         "; retry later, read replies sooner, or raise --max-held-bytes"));
      }
      bytes_ += bytes;
      budget_.held_bytes_ += bytes;
      return absl::OkStatus();
    }

    void Release() {
      if (bytes_ > 0) budget_.GiveBack(std::exchange(bytes_, 0));
    }

    // A part of it, to be given back by itself. REQUIRES: it has so many.
    Share Split(std::int64_t bytes) {
      Share part(budget_);
      part.bytes_ = bytes;
      bytes_ -= bytes;
      return part;
    }

   private:
    MemoryBudget& budget_;
    std::int64_t bytes_ = 0;
  };

  std::int64_t held_bytes() const {
    const std::lock_guard lock(mutex_);
    return held_bytes_;
  }

 private:
  void GiveBack(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    held_bytes_ -= bytes;
  }

  const std::int64_t max_bytes_;
  mutable std::mutex mutex_;
  std::int64_t held_bytes_ = 0;  // Guarded by mutex_.
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MEMORY_BUDGET_H_
