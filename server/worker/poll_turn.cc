#include "server/worker/poll_turn.h"

namespace epserve::worker {

bool PollTurn::Await() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!begun_) {
    begun_ = true;
    return true;
  }
  std::uint64_t seen_absences = num_absences_.load(std::memory_order_relaxed);
  std::uint64_t seen_away = 0;
  int idle_looks = 0;
  while (!ended_) {
    if (idle_looks >= idle_looks_) {
      // Sequentially consistent, before the look at `away_`: pairs with Leave().
      asleep_.store(true, std::memory_order_seq_cst);
      if (away_.load(std::memory_order_seq_cst) == 0) {
        changed_.wait(lock, [this] { return ended_ || !asleep_.load(std::memory_order_relaxed); });
      }
      asleep_.store(false, std::memory_order_relaxed);
      idle_looks = 0;
    } else {
      changed_.wait_for(lock, kMostAway, [this] { return ended_; });
    }
    const std::uint64_t away = away_.load(std::memory_order_relaxed);
    // The same absence at two looks has lasted for the time between them.
    if (away != 0 && away == seen_away && Return(away)) return true;
    const std::uint64_t absences = num_absences_.load(std::memory_order_relaxed);
    idle_looks = away == 0 && absences == seen_absences ? idle_looks + 1 : 0;
    seen_away = away;
    seen_absences = absences;
  }
  return false;
}

std::uint64_t PollTurn::Leave() {
  const std::uint64_t absence = num_absences_.load(std::memory_order_relaxed) + 1;
  num_absences_.store(absence, std::memory_order_relaxed);
  // Release, pairs with the other's Return(). Sequentially consistent: before the look at
  // `asleep_`.
  away_.store(absence, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst)) {
    const std::lock_guard<std::mutex> lock(mutex_);
    asleep_.store(false, std::memory_order_relaxed);
    changed_.notify_all();
  }
  return absence;
}

// Ends the absence, for whichever of the two comes first. Acquire: sees what was done before
// Leave(). Absences have numbers, so that one of the thread that took over is not mistaken for
// this.
bool PollTurn::Return(std::uint64_t absence) {
  return away_.compare_exchange_strong(absence, 0, std::memory_order_acq_rel);
}

void PollTurn::End() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ended_ = true;
  changed_.notify_all();
}

}  // namespace epserve::worker
