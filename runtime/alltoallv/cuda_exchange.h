// Dispatch and combine of one rank on one GPU by one-sided kernels: owns the rank's symmetric heap,
// the mappings of its peers' heaps and the small local buffers beside them. All memory is taken at
// Create; a batch allocates nothing. Calls enqueue on the caller's stream and return.
//
// Thread safety: as DeviceExchange states.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_EXCHANGE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/alltoallv/combine_blocks.h"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/device_exchange.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/base/deadline.h"
#include "runtime/symmetric/cuda_heap.h"
#include "runtime/symmetric/handle_socket.h"

namespace epserve::runtime {

struct CudaExchangeConfig {
  ExchangeConfig base;
  std::string socket_directory;  // of handle sockets; empty: abstract names
  HandleType handle_type = HandleType::kFd;
  std::uint64_t settings_digest = 0;     // of what else all ranks must have alike
  std::int64_t max_decode_tokens = 512;  // a rank
  // Decode path: up to so many tokens of a rank travel as lines (see cuda_line_device.cuh), where
  // the current device reaches the others over NVLink.
  std::int64_t line_tokens = 128;
  int max_element_bytes = 2;        // 4 where FP32 batches are served
  int comm_blocks = 24;             // of dispatch (prefill path)
  int push_blocks = 0;              // of combine's push role (prefill path); 0: divided
  int reduce_blocks = 0;            // of its reduce role; 0: what 2 * comm_blocks leave
  int max_reduce_blocks = 1024;     // of these, where they are divided
  int decode_blocks = 128;          // of dispatch on the decode path
  int decode_combine_blocks = 264;  // of combine on the decode path; each has both roles
};

class CudaExchange final : public DeviceExchange {
 public:
  // INVALID_ARGUMENT: outside what the kernels take. RESOURCE_EXHAUSTED: the heap does not fit.
  static absl::StatusOr<std::unique_ptr<CudaExchange>> Create(const CudaExchangeConfig& config);
  ~CudaExchange() override;

  static std::int64_t HeapBytes(const CudaExchangeConfig& config);

  // What a rank takes from the device: the heap, and the small buffers beside it.
  static std::int64_t DeviceBytes(const CudaExchangeConfig& config);

  const std::string& handle() const override { return handle_; }
  std::string handle_type() const override;
  absl::Status OpenPeers(std::span<const std::string> handles, absl::Duration timeout) override;
  void Seal() override;

  bool exchanges_counts() const override { return true; }
  absl::StatusOr<CountMatrix> ExchangeCounts(int slot, std::uint64_t batch,
                                             const ShardCounts& counts, absl::Duration timeout,
                                             cudaStream_t stream) override;

  bool sends_lines() const override { return sends_lines_; }
  bool dispatches_uncounted() const override { return true; }
  absl::Status Dispatch(Path path, int slot, const CudaTokens& tokens, const CountMatrix* counts,
                        cudaStream_t stream) override;
  absl::Status LayOutExperts(Path path, int slot, cudaStream_t stream) override;
  absl::Status Gather(Path path, int slot, const CudaTokens& tokens, void* expert_inputs,
                      cudaStream_t stream) override;
  absl::Status Combine(Path path, int slot, const CudaTokens& tokens, const void* expert_rows,
                       void* out, cudaStream_t stream) override;
  // All ranks meet on the device. For measuring.
  absl::Status Barrier(cudaStream_t stream);

  const std::int32_t* expert_offset(Path path, int slot) const override;
  const std::int32_t* counted_offset(int slot) const override;
  std::int64_t row_capacity(Path path) const override;
  // Where a rank's first slot receives rows, in this device's address space. For measuring the
  // link.
  std::byte* PeerRows(int rank) const;

  absl::Status CheckWaits() const override;
  void Abort() override;

 private:
  struct Local;  // one area's local buffers

  explicit CudaExchange(const CudaExchangeConfig& config);
  absl::Status Initialize();
  absl::Status AllocateLocals();
  absl::Status ShareHeap();
  absl::StatusOr<DeviceAllocation> OpenPeer(const CudaHeapHandle& peer,
                                            const Deadline& deadline) const;
  AreaView ViewOf(Path path, int slot) const;
  // Where rows and partial rows of the batch stand, here and at the peers.
  void PlaceByCounts(const CountMatrix& counts, Local& local, CudaDispatchArgs& args) const;
  void PlaceBySource(std::int64_t most_rows, Local& local, CudaDispatchArgs& args) const;
  Local& LocalOf(Path path, int slot);
  const Local& LocalOf(Path path, int slot) const;
  WaitControl Wait() const;
  CombineBlocks PrefillCombineBlocks(int topk) const;

  CudaExchangeConfig config_;
  CudaHeapLayout layout_;
  DeviceMapping heap_;
  CudaHeapHandle own_;
  std::string handle_;  // own_, encoded
  std::vector<DeviceMapping> peers_;
  std::unique_ptr<HandleServer> server_;
  std::vector<std::unique_ptr<Local>> locals_;  // [num_slots + 1], the decode path's last
  DeviceBuffer barrier_use_;  // u64 barriers so far, then u32 WaitControl::report_claim
  PinnedBuffer host_words_;   // abort word, then WaitReport
  std::atomic<bool> aborted_ = false;
  bool sends_lines_ = false;  // on the decode path
  bool opened_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_EXCHANGE_H_
