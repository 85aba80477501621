// Dispatch and combine of one rank on one GPU: owns the rank's symmetric heap, the mappings of its
// peers' heaps and the small local buffers beside them. All memory is taken at Create; a batch
// allocates nothing. Calls enqueue on the caller's stream and return.
//
// Thread safety: one thread at a time for a slot (the decode path counts as one slot), different
// slots at once; Abort() from any thread. The current device must be the same in every call.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_EXCHANGE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/symmetric/cuda_heap.h"
#include "runtime/symmetric/handle_socket.h"

namespace epserve::runtime {

struct CudaExchangeConfig {
  ExchangeConfig base;
  std::string secret;                    // of the cluster; at most 64 bytes
  std::string socket_directory;          // empty: abstract socket names
  std::int64_t max_decode_tokens = 512;  // a rank
  int max_element_bytes = 2;             // 4 where FP32 batches are served
  int comm_blocks = 24;                  // of dispatch and of combine's push role (prefill path)
  int reduce_blocks = 24;                // of combine's reduce role (prefill path)
  int decode_blocks = 128;               // of dispatch on the decode path
  int decode_combine_blocks = 264;       // of combine on the decode path; each has both roles
};

// One rank's tokens, in device memory.
struct CudaTokens {
  const void* x = nullptr;                 // [T, H] dtype, 16-byte aligned; valid until combine ran
  const std::int32_t* topk_ids = nullptr;  // [T, K] global expert id, -1 = none; 16-byte aligned
  const float* topk_weights = nullptr;     // [T, K]
  std::int64_t num_tokens = 0;             // T
  int topk = 0;                            // K
  DataType dtype = DataType::kBf16;
  RowPayload payload = RowPayload::kCopy;
};

class CudaExchange {
 public:
  // The path a batch takes. kDecode needs no count matrix and can be captured in a CUDA graph.
  enum class Path { kPrefill, kDecode };

  // INVALID_ARGUMENT: outside what the kernels take. RESOURCE_EXHAUSTED: the heap does not fit.
  static absl::StatusOr<std::unique_ptr<CudaExchange>> Create(const CudaExchangeConfig& config);
  ~CudaExchange();

  static std::int64_t HeapBytes(const CudaExchangeConfig& config);

  // Maps every peer's heap, fetched from the peers' handle sockets. UNAVAILABLE after `timeout`.
  absl::Status OpenPeers(absl::Duration timeout);
  // Every peer has mapped this heap: stops handing out its descriptor.
  void Seal();

  // `slot` is the batch's slot; of no meaning on the decode path. `counts` is read on the prefill
  // path alone, during the call.
  absl::Status Dispatch(Path path, int slot, const CudaTokens& tokens, const CountMatrix* counts,
                        cudaStream_t stream);
  // Expert-major order of what was dispatched: expert_index [rows, K] and expert_offset [E_local +
  // 1].
  absl::Status LayOutExperts(Path path, int slot, cudaStream_t stream);
  // Copies the received rows into expert-major order: expert_inputs [M, H].
  absl::Status Gather(Path path, int slot, const CudaTokens& tokens, void* expert_inputs,
                      cudaStream_t stream);
  // expert_rows [M, H] dtype are the experts' outputs in that order; out [T, H] dtype.
  absl::Status Combine(Path path, int slot, const CudaTokens& tokens, const void* expert_rows,
                       void* out, cudaStream_t stream);
  absl::Status Barrier(cudaStream_t stream);

  const std::int32_t* expert_offset(Path path, int slot) const;  // [E_local + 1] device
  std::int64_t row_capacity(Path path) const;                    // rows an area can receive
  // Where a rank's first slot receives rows, in this device's address space. For measuring the
  // link.
  std::byte* PeerRows(int rank) const;

  // After synchronising with a stream: DEADLINE_EXCEEDED or ABORTED if a device wait gave up,
  // naming rank, peer, stage and how long.
  absl::Status CheckWaits() const;
  // Ends every device wait, now and from now on.
  void Abort();

 private:
  struct Local;  // one area's local buffers

  explicit CudaExchange(const CudaExchangeConfig& config);
  absl::Status Initialize();
  AreaView ViewOf(Path path, int slot) const;
  Local& LocalOf(Path path, int slot);
  const Local& LocalOf(Path path, int slot) const;
  WaitControl Wait() const;

  CudaExchangeConfig config_;
  CudaHeapLayout layout_;
  DeviceMapping heap_;
  std::vector<DeviceMapping> peers_;
  std::unique_ptr<HandleServer> server_;
  std::vector<std::unique_ptr<Local>> locals_;  // [num_slots + 1], the decode path's last
  DeviceBuffer barrier_use_;
  PinnedBuffer host_words_;  // abort word, then WaitReport
  bool opened_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_EXCHANGE_H_
