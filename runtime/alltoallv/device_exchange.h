// Dispatch and combine of one rank on one GPU, whatever carries the rows: one-sided kernels over a
// symmetric heap (CudaExchange) or a collective library. What the CUDA engine drives.
//
// All memory is taken before the first batch; a batch allocates nothing. Batch calls enqueue on the
// caller's stream and return before they run (NCCL's may first wait for its own threads, no longer
// than the peer timeout), so every error of the device's own shows in CheckWaits() or in the
// stream's synchronisation.
//
// A batch on a slot: [ExchangeCounts ─►] Dispatch ─► LayOutExperts ─► Gather ─► (experts) ─►
// Combine, on one stream. Where dispatches_uncounted(), no host needs to know the counts. Thread
// safety: one thread at a time for a slot (the decode path counts as one slot), different slots at
// once; Abort() from any thread. The current device must be the same in every call.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_DEVICE_EXCHANGE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_DEVICE_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/cuda_layout.h"
#include "runtime/base/dtype.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::runtime {

// One rank's tokens, in device memory.
struct CudaTokens {
  const void* x = nullptr;  // [T, H] dtype, 16-byte aligned; valid until combine ran
  // [T, K] global expert ids, -1 = none; 16-byte aligned. REQUIRES: below E. Nobody checks it: a
  // larger one is read past what the kernels know of experts.
  const std::int32_t* topk_ids = nullptr;
  const float* topk_weights = nullptr;  // [T, K]
  std::int64_t num_tokens = 0;          // T
  int topk = 0;                         // K
  DataType dtype = DataType::kBf16;
  RowPayload payload = RowPayload::kCopy;
};

class DeviceExchange {
 public:
  // The path a batch takes. kDecode needs no count matrix and can be captured in a CUDA graph; its
  // Combine waits with all of its blocks, so nothing else that waits for peers may run beside it.
  enum class Path { kPrefill, kDecode };

  virtual ~DeviceExchange() = default;

  // What this rank's peers need to open it, as it travels between the ranks; binary, fixed for the
  // exchange's life. It grants access: whoever has it can write this rank's heap.
  virtual const std::string& handle() const = 0;
  // For logs: "fd", "fabric", "nccl", ...
  virtual std::string handle_type() const = 0;

  // Opens every peer by its handle ([R], by rank; the own one is not looked at).
  // UNAVAILABLE: a peer does not answer within `timeout`. INVALID_ARGUMENT: a handle of another
  // epoch, rank or layout, naming the field. Blocks; returns early, with ABORTED, after Abort().
  virtual absl::Status OpenPeers(std::span<const std::string> handles, absl::Duration timeout) = 0;
  // Every peer has opened this rank: takes back what the handle grants.
  virtual void Seal() = 0;

  // Whether ExchangeCounts is to be had.
  virtual bool exchanges_counts() const { return false; }
  // The count matrix of a batch, which the ranks gather among themselves on the device; the same on
  // all. `batch` is its number in the epoch, above that of the slot's last. Blocks until it is
  // there, but no longer than `timeout`, which must exceed the peer timeout: DEADLINE_EXCEEDED, as
  // where a peer's counts do not come, which CheckWaits() then names, too. ABORTED: after Abort().
  virtual absl::StatusOr<CountMatrix> ExchangeCounts(int /*slot*/, std::uint64_t /*batch*/,
                                                     const ShardCounts& /*counts*/,
                                                     absl::Duration /*timeout*/,
                                                     cudaStream_t /*stream*/) {
    return absl::UnimplementedError(absl::StrCat("counts: ranks of handle type ", handle_type(),
                                                 " do not exchange them on the device"));
  }

  // Whether the decode path sends few rows as lines of the link, which tell of themselves.
  virtual bool sends_lines() const { return false; }

  // Whether the prefill path takes batches without a count matrix.
  virtual bool dispatches_uncounted() const { return false; }
  // `slot` is the batch's slot; of no meaning on the decode path. `counts` is read on the prefill
  // path alone, during the call. Null there, on all ranks, where dispatches_uncounted(): each
  // source's rows have a place for a whole shard, and the counts come with them.
  virtual absl::Status Dispatch(Path path, int slot, const CudaTokens& tokens,
                                const CountMatrix* counts, cudaStream_t stream) = 0;
  // Expert-major order of what was dispatched: expert_offset(path, slot).
  virtual absl::Status LayOutExperts(Path path, int slot, cudaStream_t stream) = 0;
  // Copies the received rows into expert-major order: expert_inputs [M, H] dtype (fp8 rows come
  // out as bf16).
  virtual absl::Status Gather(Path path, int slot, const CudaTokens& tokens, void* expert_inputs,
                              cudaStream_t stream) = 0;
  // expert_rows [M, H] dtype are the experts' outputs in that order; out [T, H] dtype, overwritten.
  virtual absl::Status Combine(Path path, int slot, const CudaTokens& tokens,
                               const void* expert_rows, void* out, cudaStream_t stream) = 0;

  // First row of each local expert in expert-major order, [E_local + 1] i32 in device memory; the
  // last is M.
  virtual const std::int32_t* expert_offset(Path path, int slot) const = 0;
  // The same of a slot's batch that was dispatched without a count matrix, in memory of the host;
  // to be read once the batch has ended. Null: not dispatches_uncounted().
  virtual const std::int32_t* counted_offset(int /*slot*/) const { return nullptr; }
  // Rows that a slot can receive; each may be named by up to K local experts.
  virtual std::int64_t row_capacity(Path path) const = 0;

  // After synchronising with a stream: DEADLINE_EXCEEDED or ABORTED if a device wait gave up,
  // naming rank, stage and how long, and the peer where it is known; or the error of the library
  // that carries the rows. It stays so: the exchange is of no use any more.
  virtual absl::Status CheckWaits() const = 0;
  // Ends every wait of this rank, on the device and in OpenPeers, now and from now on.
  virtual void Abort() = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_DEVICE_EXCHANGE_H_
