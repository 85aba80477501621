// Which blocks of an epoch's row arena are whose: a batch's, from its start until its end, or, with
// the output in them, its callers', from then until the last of them has taken its rows.
//
// Lent blocks never keep a batch waiting, however long a caller takes: all of them together are of
// no more pairs than the arena has beyond its slots, so each slot finds a pair for the largest
// batch. Of all epochs' arenas that share a Lender, only one has lent blocks at a time, so that no
// more than one is kept beyond its epoch. What cannot be lent is for its holder to copy.
//
// Thread-safe. The arena stays mapped until the last of its blocks has been given back.
#ifndef EPSERVE_SERVER_COORDINATOR_ROW_BLOCKS_H_
#define EPSERVE_SERVER_COORDINATOR_ROW_BLOCKS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/symmetric/row_arena.h"

namespace epserve::coordinator {

// The epoch that has lent blocks of its arena; null: none has. Only compared.
using Lender = std::atomic<const void*>;

class RowBlocks : public std::enable_shared_from_this<RowBlocks> {
 public:
  // One batch's, given back when it goes.
  class Held {
   public:
    Held(std::shared_ptr<RowBlocks> blocks, int first, int count)
        : blocks_(std::move(blocks)), first_(first), count_(count) {}
    ~Held() { blocks_->Set(first_, count_, State::kFree); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

    int first() const { return first_; }
    std::byte* rows() const { return blocks_->arena_->rows(first_); }
    // The batch has ended, and its rows may stay here as long as somebody wants them. False: others
    // that are lent leave no room for that. Once true it stays so.
    bool Lend() { return blocks_->Lend(first_, count_); }

   private:
    const std::shared_ptr<RowBlocks> blocks_;
    const int first_;
    const int count_;
  };

  RowBlocks(std::shared_ptr<runtime::RowArena> arena, int num_slots,
            std::shared_ptr<Lender> lender);

  // For a batch whose rows take so many bytes, no more than a pair has. Null: none is free, which
  // is never so while fewer batches are held than there are slots.
  std::shared_ptr<Held> Take(std::uint64_t bytes);

  runtime::RowArena& arena() const { return *arena_; }

 private:
  enum class State : std::uint8_t { kFree, kHeld, kLent };

  bool IsLent(int pair) const;  // REQUIRES: mutex_ held
  int FindFree(int count) const;
  int NumLentPairs() const;  // REQUIRES: mutex_ held
  bool Lend(int first, int count);
  void Set(int first, int count, State state);

  const std::shared_ptr<runtime::RowArena> arena_;
  const int max_lent_pairs_;
  const std::shared_ptr<Lender> lender_;
  mutable std::mutex mutex_;
  std::vector<State> states_;  // of each block; guarded by mutex_
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ROW_BLOCKS_H_
