#include "runtime/symmetric/row_arena.h"

#include <utility>

#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// Stands where a heap's rank does; no worker has it.
constexpr int kArenaRank = 1'000'000;

constexpr std::uint64_t kAlignment = 256;

std::uint64_t Aligned(std::uint64_t bytes) { return (bytes + kAlignment - 1) & ~(kAlignment - 1); }

std::uint64_t RowBytes(const RowArenaSpec& spec) {
  return Aligned(static_cast<std::uint64_t>(spec.max_batch_tokens * spec.hidden) * 4);
}

// Of the ids, and as many of the weights.
std::uint64_t IndexBytes(const RowArenaSpec& spec) {
  return Aligned(static_cast<std::uint64_t>(spec.max_batch_tokens * spec.topk) * 4);
}

std::uint64_t SlotBytes(const RowArenaSpec& spec) { return RowBytes(spec) + 2 * IndexBytes(spec); }

HeapSpec HeapSpecOf(const RowArenaSpec& spec) {
  HeapSpec heap;
  heap.cluster_id = spec.cluster_id;
  heap.epoch = spec.epoch;
  heap.rank = kArenaRank;
  heap.bytes = RowArena::Bytes(spec);
  // FNV-1a over what the layout follows from.
  heap.layout_digest = 0xcbf29ce484222325u;
  for (const std::int64_t value : {std::int64_t{spec.num_slots}, spec.max_batch_tokens, spec.hidden,
                                   std::int64_t{spec.topk}}) {
    heap.layout_digest = (heap.layout_digest ^ static_cast<std::uint64_t>(value)) * 0x100000001b3u;
  }
  return heap;
}

}  // namespace

std::uint64_t RowArena::Bytes(const RowArenaSpec& spec) {
  return kHeapHeaderBytes + static_cast<std::uint64_t>(spec.num_slots) * SlotBytes(spec);
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

std::byte* RowArena::slot_begin(int slot) const {
  return data_ + static_cast<std::uint64_t>(slot) * SlotBytes(spec_);
}

std::int32_t* RowArena::topk_ids(int slot) const {
  return reinterpret_cast<std::int32_t*>(slot_begin(slot) + RowBytes(spec_));
}

float* RowArena::topk_weights(int slot) const {
  return reinterpret_cast<float*>(slot_begin(slot) + RowBytes(spec_) + IndexBytes(spec_));
}

}  // namespace epserve::runtime
