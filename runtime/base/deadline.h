// A point on the monotonic clock that a wait ends at, whatever happens to the wall clock meanwhile.
#ifndef EPSERVE_RUNTIME_BASE_DEADLINE_H_
#define EPSERVE_RUNTIME_BASE_DEADLINE_H_

#include <chrono>

#include "absl/time/time.h"

namespace epserve::runtime {

class Deadline {
 public:
  explicit Deadline(absl::Duration from_now)
      : from_now_(from_now), start_(std::chrono::steady_clock::now()) {}

  // Since it was set.
  absl::Duration waited() const {
    return absl::FromChrono(std::chrono::steady_clock::now() - start_);
  }
  absl::Duration left() const { return from_now_ - waited(); }
  bool passed() const { return waited() >= from_now_; }

 private:
  absl::Duration from_now_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_DEADLINE_H_
