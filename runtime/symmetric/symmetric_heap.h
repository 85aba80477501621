// A rank's heap of one epoch, and a peer's view of it. Symmetric: all ranks' heaps have one size
// and one layout, so an offset means the same in each.
//
// The segment is named /epserve-<cluster_id>-<epoch>-<rank>-<nonce> until Seal; its first page is a
// header that says whose it is. A handle is that header's bytes: a peer derives the name from it
// and then compares it with the header it finds, so a handle can lead to nothing but the heap it
// was made for. Every epoch has new segments, so an old mapping never reaches a new epoch's memory.
// Thread safety: none of its own; Create, Open and Seal are called by one thread.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_SYMMETRIC_HEAP_H_
#define EPSERVE_RUNTIME_SYMMETRIC_SYMMETRIC_HEAP_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/symmetric/shm_segment.h"

namespace epserve::runtime {

// The header takes one page; what the caller lays out begins behind it.
inline constexpr std::uint64_t kHeapHeaderBytes = 4096;

struct HeapSpec {
  std::string cluster_id;   // as IsId takes it
  std::uint64_t epoch = 0;  // > 0
  int rank = 0;
  std::uint64_t bytes = 0;          // of the whole heap, header included
  std::uint64_t layout_digest = 0;  // differs where the layout behind the header does
};

// INVALID_ARGUMENT unless `cluster_id` is [A-Za-z0-9_.-]{1,64}.
absl::Status ValidateClusterId(const std::string& cluster_id);

// This rank's own heap: zeroed, reserved and mapped.
class SymmetricHeap {
 public:
  // INVALID_ARGUMENT: spec; RESOURCE_EXHAUSTED: shared memory is full.
  static absl::StatusOr<SymmetricHeap> Create(const HeapSpec& spec);

  const std::string& handle() const { return handle_; }
  std::byte* data() const { return mapping_.data(); }  // page-aligned; the header is at its begin
  std::uint64_t bytes() const { return mapping_.bytes(); }

  // Takes the name out of the system: nobody can open the heap any more, those who have it keep it,
  // and a crash leaves nothing behind. Doing it again does nothing.
  void Seal() { segment_.name.Unlink(); }

 private:
  SymmetricHeap(CreatedSegment segment, Mapping mapping, std::string handle)
      : segment_(std::move(segment)), mapping_(std::move(mapping)), handle_(std::move(handle)) {}

  CreatedSegment segment_;
  Mapping mapping_;
  std::string handle_;
};

// A peer's heap, mapped here.
class PeerHeap {
 public:
  // Opens what `handle` names if it is what `expected` says. INVALID_ARGUMENT names the field that
  // differs; NOT_FOUND: the segment is gone; PERMISSION_DENIED: it is another user's.
  static absl::StatusOr<PeerHeap> Open(const std::string& handle, const HeapSpec& expected);

  std::byte* data() const { return mapping_.data(); }
  std::uint64_t bytes() const { return mapping_.bytes(); }

 private:
  explicit PeerHeap(Mapping mapping) : mapping_(std::move(mapping)) {}

  Mapping mapping_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_SYMMETRIC_HEAP_H_
