// The count exchange over shared memory: HostExchange::ExchangeCounts, and the records in a rank's
// heap that it goes through. Each source has a record of its own in every rank's heap, so nobody
// writes where another does. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_HOST_COUNTS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_HOST_COUNTS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "runtime/alltoallv/layout.h"
#include "runtime/routing/count_matrix.h"
#include "runtime/symmetric/shared_flag.h"

namespace epserve::runtime {

// The records of one slot of one rank's heap: a view, copied freely.
class CountRecords {
 public:
  // `slot` is where the slot begins in the heap; `layout` outlives the view.
  CountRecords(std::byte* slot, const HeapLayout& layout, int num_ranks)
      : slot_(slot), layout_(&layout), num_ranks_(num_ranks) {}

  // In a new heap, by its owner.
  void Initialize() const;
  // Writes the source's counts and raises its flag to `sequence`. REQUIRES: the source's last batch
  // on the slot has ended on every rank.
  void Publish(int source, std::uint64_t sequence, const ShardCounts& counts) const;
  SharedFlag* flag(int source) const { return &record(source).flag; }
  // Adds the source's counts to `matrix`, which has its sizes. REQUIRES: the flag was seen at
  // `sequence`. INTERNAL: the record is another batch's.
  absl::Status AddTo(CountMatrix* matrix, int source, std::uint64_t sequence) const;

 private:
  CountRecord& record(int source) const {
    return *reinterpret_cast<CountRecord*>(slot_ + layout_->counts_offset +
                                           static_cast<std::uint64_t>(source) *
                                               layout_->count_record_bytes);
  }
  // [R], then [E].
  std::int32_t* values(int source) const {
    return reinterpret_cast<std::int32_t*>(&record(source) + 1);
  }

  std::byte* slot_;
  const HeapLayout* layout_;
  int num_ranks_;
};

// Adds a rank's own counts to a matrix that has its sizes.
void AddCounts(const ShardCounts& counts, int source, CountMatrix* matrix);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_HOST_COUNTS_H_
