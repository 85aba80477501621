#include "runtime/symmetric/row_arena.h"

#include <utility>

#include "runtime/base/digest.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// Raised with every change of where things stand in an arena.
constexpr std::int64_t kLayoutVersion = 2;

constexpr std::uint64_t kAlignment = 256;

std::uint64_t Aligned(std::uint64_t bytes) { return (bytes + kAlignment - 1) & ~(kAlignment - 1); }

std::uint64_t BlockBytes(const RowArenaSpec& spec) {
  return Aligned(static_cast<std::uint64_t>(spec.max_batch_tokens * spec.hidden) * 2);
}

std::uint64_t AllBlocksBytes(const RowArenaSpec& spec) {
  return 2 * static_cast<std::uint64_t>(RowArena::NumPairs(spec.num_slots)) * BlockBytes(spec);
}

// Of a slot's ids, and as many of its weights.
std::uint64_t IndexBytes(const RowArenaSpec& spec) {
  return Aligned(static_cast<std::uint64_t>(spec.max_batch_tokens * spec.topk) * 4);
}

HeapSpec HeapSpecOf(const RowArenaSpec& spec) {
  HeapSpec heap;
  heap.cluster_id = spec.cluster_id;
  heap.epoch = spec.epoch;
  heap.rank = kCoordinatorRank;
  heap.bytes = RowArena::Bytes(spec);
  Digest layout;
  for (const std::int64_t value : {kLayoutVersion, std::int64_t{spec.num_slots},
                                   spec.max_batch_tokens, spec.hidden, std::int64_t{spec.topk}}) {
    layout.Add(value);
  }
  heap.layout_digest = layout.value();
  return heap;
}

}  // namespace

std::uint64_t RowArena::Bytes(const RowArenaSpec& spec) {
  return kHeapHeaderBytes + AllBlocksBytes(spec) +
         2 * static_cast<std::uint64_t>(spec.num_slots) * IndexBytes(spec);
}

absl::StatusOr<std::shared_ptr<RowArena>> RowArena::Create(const RowArenaSpec& spec) {
  std::shared_ptr<RowArena> arena(new RowArena(spec));
  EPS_ASSIGN_OR_RETURN(SymmetricHeap heap, SymmetricHeap::Create(HeapSpecOf(spec)));
  arena->own_ = std::make_unique<SymmetricHeap>(std::move(heap));
  arena->data_ = arena->own_->data() + kHeapHeaderBytes;
  return arena;
}

absl::StatusOr<std::shared_ptr<RowArena>> RowArena::Open(const std::string& handle,
                                                         const RowArenaSpec& spec) {
  std::shared_ptr<RowArena> arena(new RowArena(spec));
  EPS_ASSIGN_OR_RETURN(PeerHeap heap, PeerHeap::Open(handle, HeapSpecOf(spec)));
  arena->peer_ = std::make_unique<PeerHeap>(std::move(heap));
  arena->data_ = arena->peer_->data() + kHeapHeaderBytes;
  return arena;
}

std::span<std::byte> RowArena::bytes() const {
  return {data_, static_cast<std::size_t>(Bytes(spec_) - kHeapHeaderBytes)};
}

std::uint64_t RowArena::block_bytes() const { return BlockBytes(spec_); }

std::byte* RowArena::rows(int block) const {
  return data_ + static_cast<std::uint64_t>(block) * BlockBytes(spec_);
}

bool RowArena::Holds(int block, std::uint64_t num_bytes) const {
  if (block < 0 || block >= num_blocks()) return false;
  const std::uint64_t blocks_left = block % 2 == 0 ? 2 : 1;
  return num_bytes <= blocks_left * BlockBytes(spec_);
}

std::int32_t* RowArena::topk_ids(int slot) const {
  return reinterpret_cast<std::int32_t*>(data_ + AllBlocksBytes(spec_) +
                                         static_cast<std::uint64_t>(slot) * 2 * IndexBytes(spec_));
}

float* RowArena::topk_weights(int slot) const {
  return reinterpret_cast<float*>(reinterpret_cast<std::byte*>(topk_ids(slot)) + IndexBytes(spec_));
}

}  // namespace epserve::runtime
