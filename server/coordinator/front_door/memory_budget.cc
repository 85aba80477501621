#include "server/coordinator/front_door/memory_budget.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {

MemoryBudget::Share::Share(Share&& other) noexcept : budget_(other.budget_) {
  const std::lock_guard lock(budget_.mutex_);
  bytes_ = std::exchange(other.bytes_, 0);
}

absl::Status MemoryBudget::Share::Grow(std::int64_t bytes) {
  const std::lock_guard lock(budget_.mutex_);
  if (!budget_.MakeRoom(bytes, bytes_)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("infer: ", bytes, " bytes beside the ", budget_.held_bytes_,
                     " that requests and replies hold exceed ", budget_.max_bytes_,
                     "; retry later, read replies sooner, or raise --max-held-bytes"));
  }
  bytes_ += bytes;
  budget_.held_bytes_ += bytes;
  return absl::OkStatus();
}

void MemoryBudget::Share::AwaitCaller(std::function<void()> give_up) {
  const std::lock_guard lock(budget_.mutex_);
  if (bytes_ == 0) return;  // Nobody would gain by it.
  give_up_ = std::move(give_up);
  waits_since_ = budget_.now_();
  place_ = budget_.waiting_.insert(budget_.waiting_.end(), this);
}

void MemoryBudget::Share::Release() {
  const std::lock_guard lock(budget_.mutex_);
  if (place_.has_value()) budget_.StopWaiting(this);
  budget_.held_bytes_ -= std::exchange(bytes_, 0);
}

MemoryBudget::Share MemoryBudget::Share::Split(std::int64_t bytes) {
  Share part(budget_);
  const std::lock_guard lock(budget_.mutex_);
  part.bytes_ = bytes;
  bytes_ -= bytes;
  return part;
}

bool MemoryBudget::MakeRoom(std::int64_t bytes, std::int64_t own) {
  if (HasRoom(bytes, own, held_bytes_)) return true;
  const TimePoint latest = now_() - kLeastWait;
  std::int64_t held = held_bytes_;
  auto end = waiting_.begin();
  for (; end != waiting_.end() && !HasRoom(bytes, own, held); ++end) {
    if ((*end)->waits_since_ > latest) break;
    held -= (*end)->bytes_;
  }
  if (!HasRoom(bytes, own, held)) return false;
  while (waiting_.begin() != end) {
    Share* const oldest = waiting_.front();
    // The call still has to end, but its reply goes with this.
    std::exchange(oldest->give_up_, nullptr)();
    StopWaiting(oldest);
    held_bytes_ -= std::exchange(oldest->bytes_, 0);
  }
  return true;
}

void MemoryBudget::StopWaiting(Share* share) {
  waiting_.erase(*share->place_);
  share->place_.reset();
  share->give_up_ = nullptr;
}

}  // namespace epserve::coordinator
