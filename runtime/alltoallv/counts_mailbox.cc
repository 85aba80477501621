#include "runtime/alltoallv/counts_mailbox.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {

absl::StatusOr<CountsMailboxBuffer> CountsMailboxBuffer::Create(int num_ranks,
                                                                std::int64_t num_experts) {
  CountsMailboxBuffer buffer;
  buffer.num_ranks_ = num_ranks;
  buffer.num_experts_ = num_experts;
  const std::int64_t values = num_ranks + num_experts + num_ranks * num_ranks + num_experts;
  const auto bytes = static_cast<std::size_t>(8 * (1 + num_ranks) + 4 * values);
  EPS_ASSIGN_OR_RETURN(buffer.memory_, PinnedBuffer::Create(bytes));
  std::memset(buffer.memory_.as<std::byte>(), 0, bytes);
  return buffer;
}

CountsMailbox CountsMailboxBuffer::mailbox() const {
  CountsMailbox mailbox{};
  mailbox.done = memory_.as<std::uint64_t>();
  mailbox.sequence = mailbox.done + 1;
  mailbox.matrix = reinterpret_cast<std::int32_t*>(mailbox.sequence + num_ranks_);
  mailbox.own = mailbox.matrix + num_ranks_ * num_ranks_ + num_experts_;
  return mailbox;
}

CountsMailbox CountsMailboxBuffer::Post(const ShardCounts& counts) {
  const CountsMailbox box = mailbox();
  auto* own = const_cast<std::int32_t*>(box.own);  // The kernel's to read, this side's to write.
  for (const std::int32_t rows : counts.rows_to_rank) *own++ = rows;
  for (const std::int64_t pairs : counts.rows_per_expert) *own++ = static_cast<std::int32_t>(pairs);
  return box;
}

bool CountsMailboxBuffer::IsDone(std::uint64_t batch) const {
  // acquire: pairs with the kernel's release, the matrix is visible after it.
  return std::atomic_ref<std::uint64_t>(*mailbox().done).load(std::memory_order_acquire) == batch;
}

absl::StatusOr<CountMatrix> CountsMailboxBuffer::Read(std::uint64_t batch) const {
  const CountsMailbox box = mailbox();
  for (int source = 0; source < num_ranks_; ++source) {
    if (box.sequence[source] == batch) continue;
    return absl::InternalError(absl::StrCat("counts: rank ", source, " told those of batch ",
                                            box.sequence[source], ", expected batch ", batch));
  }
  CountMatrix counts;
  counts.num_ranks = num_ranks_;
  std::int32_t* const pairs = box.matrix + num_ranks_ * num_ranks_;
  counts.rows.assign(box.matrix, pairs);
  counts.rows_per_expert.assign(pairs, pairs + num_experts_);
  return counts;
}

}  // namespace epserve::runtime
