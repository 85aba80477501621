#include "server/coordinator/row_blocks.h"

#include <algorithm>
#include <utility>

namespace epserve::coordinator {

RowBlocks::RowBlocks(std::shared_ptr<runtime::RowArena> arena, int num_slots,
                     std::shared_ptr<Lender> lender)
    : arena_(std::move(arena)),
      max_lent_pairs_(arena_->num_blocks() / 2 - num_slots),
      lender_(std::move(lender)),
      states_(static_cast<std::size_t>(arena_->num_blocks()), State::kFree) {}

bool RowBlocks::IsLent(int pair) const {
  const auto first = states_.begin() + 2 * pair;
  return std::count(first, first + 2, State::kLent) > 0;
}

// The first of so many, -1: there are none. One block is best taken beside one that is lent: the
// two count as one pair then, should this be lent too.
int RowBlocks::FindFree(int count) const {
  int found = -1;
  for (int first = 0; first < static_cast<int>(states_.size()); first += count) {
    const auto begin = states_.begin() + first;
    const bool free =
        std::all_of(begin, begin + count, [](State state) { return state == State::kFree; });
    if (!free) continue;
    if (IsLent(first / 2)) return first;
    if (found < 0) found = first;
  }
  return found;
}

std::shared_ptr<RowBlocks::Held> RowBlocks::Take(std::uint64_t bytes) {
  const int count = bytes <= arena_->block_bytes() ? 1 : 2;
  int first = -1;
  {
    const std::lock_guard lock(mutex_);
    first = FindFree(count);
    if (first < 0) return nullptr;
    std::fill_n(states_.begin() + first, count, State::kHeld);
  }
  return std::make_shared<Held>(shared_from_this(), first, count);
}

int RowBlocks::NumLentPairs() const {
  int lent_pairs = 0;
  for (int pair = 0; 2 * pair < static_cast<int>(states_.size()); ++pair) {
    lent_pairs += IsLent(pair) ? 1 : 0;
  }
  return lent_pairs;
}

bool RowBlocks::Lend(int first, int count) {
  const std::lock_guard lock(mutex_);
  if (!IsLent(first / 2) && NumLentPairs() >= max_lent_pairs_) return false;
  const void* lender = nullptr;
  if (!lender_->compare_exchange_strong(lender, this) && lender != this) return false;
  std::fill_n(states_.begin() + first, count, State::kLent);
  return true;
}

void RowBlocks::Set(int first, int count, State state) {
  const std::lock_guard lock(mutex_);
  const bool was_lent = states_[static_cast<std::size_t>(first)] == State::kLent;
  std::fill_n(states_.begin() + first, count, state);
  if (was_lent && NumLentPairs() == 0) lender_->store(nullptr);
}

}  // namespace epserve::coordinator
