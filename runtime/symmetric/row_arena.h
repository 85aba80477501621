// Memory in which the coordinator hands the rows of batches to the workers of its machine, so that
// they need not travel through sockets: tokens' states in blocks, expert ids and weights in one
// place for each slot. The experts' output takes the place of the states.
//
// There are more blocks than the slots need, so that outputs may stay in theirs until their callers
// have taken them, while the next batches have their rows in others. Which block is whose is the
// coordinator's to say.
//
// One arena an epoch, made by the coordinator before the epoch forms and opened by each worker that
// shares its memory. An old epoch's mapping never reaches a new epoch's arena, so a worker that was
// given up and writes late changes nothing.
// Thread safety: none of its own; a batch's rows are touched by one side at a time, handed over by
// messages.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_ROW_ARENA_H_
#define EPSERVE_RUNTIME_SYMMETRIC_ROW_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/symmetric/symmetric_heap.h"

namespace epserve::runtime {

struct RowArenaSpec {
  std::string cluster_id;
  std::uint64_t epoch = 0;
  int num_slots = 0;
  std::int64_t max_batch_tokens = 0;  // T of a slot and of a block
  std::int64_t hidden = 0;            // H
  int topk = 0;                       // K
};

class RowArena {
 public:
  // RESOURCE_EXHAUSTED: shared memory is full; says needed and free.
  static absl::StatusOr<std::shared_ptr<RowArena>> Create(const RowArenaSpec& spec);
  // NOT_FOUND: there is no such memory on this machine, or no longer. INVALID_ARGUMENT: it is not
  // what `spec` says. PERMISSION_DENIED: it is another user's.
  static absl::StatusOr<std::shared_ptr<RowArena>> Open(const std::string& handle,
                                                        const RowArenaSpec& spec);
  static std::uint64_t Bytes(const RowArenaSpec& spec);

  const std::string& handle() const { return own_->handle(); }  // REQUIRES: made by Create
  // Nobody can open it any more; a crash leaves nothing behind. REQUIRES: made by Create.
  void Seal() { own_->Seal(); }

  // Blocks 2i and 2i + 1 stand one behind the other, and together make a pair; there is a pair for
  // each slot, and one more.
  int num_blocks() const { return 2 * NumPairs(spec_.num_slots); }
  // [T, H] of 2 bytes an element, or of 4 where a pair begins; rows without gaps.
  std::byte* rows(int block) const;
  std::uint64_t block_bytes() const;
  // So many bytes, from the begin of the block on, end within its pair.
  bool Holds(int block, std::uint64_t num_bytes) const;

  std::int32_t* topk_ids(int slot) const;  // [T, K]
  float* topk_weights(int slot) const;     // [T, K]
  // All blocks and all slots' places.
  std::span<std::byte> bytes() const;

  static int NumPairs(int num_slots) { return num_slots + 1; }

 private:
  explicit RowArena(const RowArenaSpec& spec) : spec_(spec) {}

  const RowArenaSpec spec_;
  std::unique_ptr<SymmetricHeap> own_;  // of the side that made it
  std::unique_ptr<PeerHeap> peer_;      // of the side that opened it
  std::byte* data_ = nullptr;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_ROW_ARENA_H_
