// The host's end of a slot's count exchange on the device: pinned memory that the kernel reads this
// rank's counts from and leaves the count matrix in. One batch at a time. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_COUNTS_MAILBOX_H_
#define EPSERVE_RUNTIME_ALLTOALLV_COUNTS_MAILBOX_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

class CountsMailboxBuffer {
 public:
  // Of R ranks and E experts.
  static absl::StatusOr<CountsMailboxBuffer> Create(int num_ranks, std::int64_t num_experts);
  CountsMailboxBuffer() = default;

  // Lays the counts out for the kernel. REQUIRES: they have R and E entries, and no kernel uses the
  // mailbox.
  CountsMailbox Post(const ShardCounts& counts);
  // True once the kernel has left the matrix of `batch`.
  bool IsDone(std::uint64_t batch) const;
  // INTERNAL: a source told of another batch. REQUIRES: IsDone(batch).
  absl::StatusOr<CountMatrix> Read(std::uint64_t batch) const;

 private:
  CountsMailbox mailbox() const;

  int num_ranks_ = 0;
  std::int64_t num_experts_ = 0;
  PinnedBuffer memory_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_COUNTS_MAILBOX_H_
