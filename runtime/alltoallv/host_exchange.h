// The exchange over shared memory: one heap a rank, mapped by every other rank of the epoch.
//
//   Create ─► handle() to every peer ─► OpenPeers ─► (all peers opened) Seal ─► batches
//
// What a slot needs between batches: its next Dispatch starts only after the last batch's Combine
// has returned on ALL ranks, because peers read this rank's partial rows until then. Flags carry
// the batch's sequence, which only grows, so they are never reset. Everything is allocated in
// Create and OpenPeers.
//
// Combine's `out` may be where the shard's own rows stand, also in a shared batch, whose rows the
// peers read in place: only ranks that a row is sent to read it, each has read all its rows when it
// publishes its partials, and Combine writes a row once it has seen that of all that it was sent
// to.
//
// Thread safety: as Exchange states; Create, OpenPeers and Seal come before any batch.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_HOST_EXCHANGE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_HOST_EXCHANGE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/alltoallv/host_counts.h"
#include "runtime/alltoallv/layout.h"
#include "runtime/symmetric/shared_flag.h"
#include "runtime/symmetric/symmetric_heap.h"

namespace epserve::runtime {

// INVALID_ARGUMENT names the field that is out of its range.
absl::Status ValidateExchangeConfig(const ExchangeConfig& config);

// Bytes of shared memory that one rank's heap takes. REQUIRES: a valid config.
std::uint64_t HeapBytes(const ExchangeConfig& config);

class HostExchange final : public Exchange {
 public:
  // Reserves and maps this rank's heap. INVALID_ARGUMENT: config; RESOURCE_EXHAUSTED: shared memory
  // is full.
  static absl::StatusOr<std::unique_ptr<HostExchange>> Create(const ExchangeConfig& config);
  ~HostExchange() override;

  HostExchange(const HostExchange&) = delete;
  HostExchange& operator=(const HostExchange&) = delete;

  // What a peer opens this heap by; opaque bytes.
  const std::string& handle() const { return heap_.handle(); }
  std::string handle_type() const { return "shm"; }  // for the metrics
  std::uint64_t heap_bytes() const { return layout_.heap_bytes; }

  // Maps the peers' heaps. `handles` [R] by rank, this rank's own among them. INVALID_ARGUMENT: a
  // handle that is damaged, or of another rank, epoch, cluster or shape; NOT_FOUND: its segment is
  // gone. Call once; FAILED_PRECONDITION after that.
  absl::Status OpenPeers(std::span<const std::string> handles);

  // Takes the heap's name out of the system. REQUIRES: every peer has opened it.
  void Seal() { heap_.Seal(); }

  absl::StatusOr<CountMatrix> ExchangeCounts(int slot, std::uint64_t sequence,
                                             const ShardCounts& counts) override;
  absl::Status Dispatch(const DispatchArgs& args) override;
  const ReceivedRows& Received(int slot) const override { return slots_[slot].received; }
  absl::Status Combine(int slot, void* out) override;
  void Abort() override { abort_.store(1, std::memory_order_relaxed); }

  // Where `peer` receives rows of `slot`: max_batch_tokens rows of H fp32 values, for measuring
  // plain copies into the very same memory, or as scratch.
  // REQUIRES: peers opened; no batch in the slot, or one whose received rows are read no more.
  std::span<std::byte> ReceiveRegion(int peer, int slot) const;

 private:
  struct Slot {
    ReceivedRows received;
    std::vector<const std::byte*> row_pointers;     // [max_batch_tokens]
    std::vector<std::uint64_t> token_destinations;  // [max shard tokens] bit r: goes to rank r
    std::uint64_t counted_sequence = 0;             // of the last counts told; 0: none yet
    std::uint64_t sequence = 0;                     // of the last batch; 0: none yet
    bool dispatched = false;                        // Combine may follow
    std::int64_t num_tokens = 0;
    const CountMatrix* counts = nullptr;
  };

  HostExchange(const ExchangeConfig& config, const HeapLayout& layout, SymmetricHeap heap);

  absl::Status ValidateCounts(int slot, std::uint64_t sequence, const ShardCounts& counts) const;
  CountRecords RecordsOf(int rank, int slot) const;
  absl::Status ValidateDispatch(const DispatchArgs& args) const;
  // Fills the slot's token_destinations; refuses bad ids and a count matrix that says otherwise.
  absl::Status RouteShard(const DispatchArgs& args, Slot* slot) const;
  // The same for a shared batch, of which it also takes this rank's rows.
  absl::Status TakeShared(const DispatchArgs& args, Slot* slot) const;
  void PushRows(const DispatchArgs& args, Slot* slot) const;
  void PublishRows(const DispatchArgs& args) const;
  absl::Status AwaitRows(const DispatchArgs& args) const;
  void PointAtReceived(const DispatchArgs& args, Slot* slot) const;
  void DescribeReceived(const DispatchArgs& args, Slot* slot) const;
  // Waits for any of the `awaited` among `peers`, a bit each. Where none comes in time, all peers
  // are named whose flags have not come.
  absl::Status AwaitPeers(const char* stage, int slot, std::uint64_t sequence, std::uint64_t peers,
                          std::uint64_t awaited, absl::FunctionRef<SharedFlag*(int)> flag_of,
                          const WaitLimits& limits) const;
  absl::Status AwaitPeer(const char* stage, int slot, std::uint64_t sequence, int peer,
                         SharedFlag* flag, const WaitLimits& limits) const {
    const std::uint64_t bit = std::uint64_t{1} << peer;
    return AwaitPeers(
        stage, slot, sequence, bit, bit, [flag](int) { return flag; }, limits);
  }
  SharedFlag* PartialsReady(int slot, int rank) const;
  std::uint64_t RanksWithPartials(int slot, std::uint64_t ranks) const;
  absl::Status SumPartials(int slot_index, void* out) const;
  absl::Status Aborted(const char* stage) const;

  const ExchangeConfig config_;
  const HeapLayout layout_;
  SymmetricHeap heap_;
  std::vector<PeerHeap> peers_;      // one a rank but for this one
  std::vector<std::byte*> heaps_;    // [R] base of every rank's heap; empty until OpenPeers
  std::vector<std::uint8_t> owner_;  // [E] rank that owns the expert
  std::vector<Slot> slots_;          // [num_slots]
  std::atomic<std::uint32_t> abort_{0};
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_HOST_EXCHANGE_H_
