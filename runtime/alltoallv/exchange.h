// Dispatch and combine of one rank on the host backend's terms: memory that a CPU can address.
// The CUDA and NCCL backends meet this one at runtime/engine/engine.h.
//
// Dispatch is a push: each source writes a row once into the heap of every rank that owns one of
// its experts, at the offset that the count matrix gives, then raises a flag. Rows a rank sends to
// itself are not copied. Combine is one-sided too: the expert side leaves one partial row per
// received row in its own heap and raises a flag; the source adds its tokens' partials in ascending
// rank order, in fp32, straight from its peers' heaps.
//
// Where every rank sees all rows of a batch, dispatch pushes nothing: each rank takes its rows
// where they stand, and waits for nobody, or for those whose rows follow (shared_batch.h). Combine
// is the same.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_EXCHANGE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_EXCHANGE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/shared_batch.h"
#include "runtime/base/dtype.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

// Fixed at start; every rank of an epoch has the same.
struct ExchangeConfig {
  std::string cluster_id;   // [A-Za-z0-9_.-]{1,64}
  std::uint64_t epoch = 0;  // > 0
  int rank = 0;
  int num_ranks = 1;                  // R in [1, 64]
  std::int64_t max_batch_tokens = 0;  // over all ranks; a rank's shard is at most ceil(that / R)
  std::int64_t hidden = 0;            // H
  int max_topk = 0;                   // K in [1, 16]
  int num_slots = 2;                  // batches in flight
  Placement placement;
  // Bound of every wait for a peer. Of several peers in one stage it is one for all, from the
  // stage's beginning; what the host backend sums of combine meanwhile is within it.
  absl::Duration peer_timeout = absl::Seconds(30);
  absl::Duration busy_poll = absl::ZeroDuration();  // spent looking before a wait sleeps (host)
};

struct DispatchArgs {
  int slot = 0;                      // [0, num_slots)
  std::uint64_t sequence = 0;        // batch number of the epoch; a slot's grow from use to use
  DataType dtype = DataType::kFp32;  // kFp32, kFp16 or kBf16, the same on all ranks
  const void* x = nullptr;           // [T, H] dtype; must stay valid until Combine returns
  const std::int32_t* topk_ids = nullptr;  // [T, K] global expert id, -1: none
  const float* topk_weights = nullptr;     // [T, K]
  std::int64_t num_tokens = 0;             // T of this rank's shard; 0 is ordinary
  int topk = 0;                            // K in [1, max_topk]
  const CountMatrix* counts = nullptr;     // must stay valid until Combine returns
  // Given on all ranks or on none, and the same batch on all. Where it is given, the shard's part
  // of it stands in place of x, topk_ids and topk_weights, and what it points to must stay valid
  // until Combine has returned on all ranks.
  SharedBatch shared;
};

// What has arrived in a slot. Rows stand in order of (source rank, token).
struct ReceivedRows {
  DataType dtype = DataType::kFp32;
  std::int64_t num_rows = 0;                    // N
  int topk = 0;                                 // K
  std::span<const std::byte* const> rows;       // [N] each [H] dtype, wherever the row lies
  const std::int32_t* local_experts = nullptr;  // [N, K] expert id less first_expert, -1: not here
  const float* weights = nullptr;               // [N, K]
  std::byte* partial_rows = nullptr;  // [N, H] dtype, out: weighted sum over local experts
  // Scratch of [MaxSumRows(max_batch_tokens), H], free until Combine where dtype has 2 bytes: such
  // rows leave half of the partial rows' place, which is sized for fp32.
  float* sums = nullptr;
};

constexpr std::int64_t MaxSumRows(std::int64_t max_batch_tokens) {
  return max_batch_tokens < 2 ? 1 : max_batch_tokens / 2;
}

// One rank's side of one epoch. Each slot is used by one thread at a time; different slots may be
// used by different threads at once. Abort() may be called from any thread.
class Exchange {
 public:
  virtual ~Exchange() = default;

  // Tells every rank this one's counts of a batch (`counts` of R and E entries), waits for theirs,
  // and gives the count matrix, the same on all ranks. `sequence` is the batch's, as Dispatch's.
  // INVALID_ARGUMENT: outside the config. Other errors as Dispatch's.
  virtual absl::StatusOr<CountMatrix> ExchangeCounts(int slot, std::uint64_t sequence,
                                                     const ShardCounts& counts) = 0;

  // Pushes the shard, then waits until every source's rows are in this rank's heap; or takes this
  // rank's rows of a shared batch.
  // INVALID_ARGUMENT: args outside the config. DEADLINE_EXCEEDED: a peer's rows did not come within
  // peer_timeout; the message names rank, peer, stage and how long. ABORTED: Abort() was called.
  virtual absl::Status Dispatch(const DispatchArgs& args) = 0;

  // What Dispatch received; valid until the slot's Combine returns.
  virtual const ReceivedRows& Received(int slot) const = 0;

  // Publishes the slot's partial rows, waits for the peers', and writes the sums to `out`
  // ([T, H] in the slot's dtype, overwritten). A token without experts gets zeros.
  // Errors as Dispatch's.
  virtual absl::Status Combine(int slot, void* out) = 0;

  // Ends every wait of this rank, now and from now on, with ABORTED.
  virtual void Abort() = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_EXCHANGE_H_
