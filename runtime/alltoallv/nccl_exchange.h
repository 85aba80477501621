// Dispatch and combine of one rank on one GPU by NCCL's grouped sends and receives: the way to
// peers whose memory this GPU cannot map, on other machines too.
//
// Rows are packed, put in expert-major order, gathered and summed by the kernels of CudaExchange,
// pointed at memory of this device alone: an area that receives, and a twin of it that holds what
// is to be sent. NCCL carries one to the other. The results are the same, bit for bit.
//
//   Dispatch   pack into the sending area ─► NCCL: metadata and rows ─► the peers' receiving areas
//   Combine    partial rows into the sending area ─► NCCL ─► receiving area ─► sum
//
// The prefill path sends what the count matrix says. The decode path sends max_decode_tokens rows
// to every peer, however few there are, so that a graph can be replayed.
// Thread safety: as DeviceExchange states.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_NCCL_EXCHANGE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_NCCL_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/device_exchange.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/alltoallv/nccl_handle.h"
#include "runtime/alltoallv/nccl_lanes.h"
#include "runtime/alltoallv/nccl_watch.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/base/deadline.h"

namespace epserve::runtime {

struct NcclExchangeConfig {
  ExchangeConfig base;
  std::uint64_t settings_digest = 0;   // of what else all ranks must have alike
  std::int64_t max_decode_tokens = 0;  // a rank; 0: there is no decode path
  int max_element_bytes = 2;           // 4 where FP32 batches are served
  int comm_blocks = 24;                // of the GPU that one batch's transfers take, at most
};

class NcclExchange final : public DeviceExchange {
 public:
  // On the current device. INVALID_ARGUMENT: outside what the kernels take. FAILED_PRECONDITION:
  // NCCL is not installed. RESOURCE_EXHAUSTED: the device is full. The process's first call comes
  // before it has a second thread, as LoadNcclApi says.
  static absl::StatusOr<std::unique_ptr<NcclExchange>> Create(const NcclExchangeConfig& config);
  ~NcclExchange() override;

  // What a rank takes from the device; NCCL's own buffers, which it does not tell, come on top.
  static std::int64_t DeviceBytes(const NcclExchangeConfig& config);

  const std::string& handle() const override { return handle_; }
  std::string handle_type() const override { return "nccl"; }
  // Collective: ends when all ranks have called it.
  absl::Status OpenPeers(std::span<const std::string> handles, absl::Duration timeout) override;
  // Nothing is left to take back: an id is spent once all ranks have joined.
  void Seal() override {}

  absl::Status Dispatch(Path path, int slot, const CudaTokens& tokens, const CountMatrix* counts,
                        cudaStream_t stream) override;
  absl::Status LayOutExperts(Path path, int slot, cudaStream_t stream) override;
  absl::Status Gather(Path path, int slot, const CudaTokens& tokens, void* expert_inputs,
                      cudaStream_t stream) override;
  absl::Status Combine(Path path, int slot, const CudaTokens& tokens, const void* expert_rows,
                       void* out, cudaStream_t stream) override;

  const std::int32_t* expert_offset(Path path, int slot) const override;
  std::int64_t row_capacity(Path path) const override;

  absl::Status CheckWaits() const override;
  void Abort() override;

 private:
  struct Lane;  // one slot's memory, or the decode path's

  NcclExchange(const NcclApi& api, const NcclExchangeConfig& config);
  absl::Status Initialize();
  absl::Status Connect(const Deadline& deadline);
  absl::StatusOr<Lane*> LaneFor(const char* operation, Path path, int slot) const;
  int LaneIndex(Path path, int slot) const;
  void PlaceRows(const CountMatrix* counts, Lane& lane) const;
  AreaView ViewOf(const Lane& lane) const;
  WaitControl NoWait() const;
  absl::Status Pack(const CudaTokens& tokens, Lane& lane, cudaStream_t stream) const;
  std::vector<NcclTransfer> DispatchTransfers(const CudaTokens& tokens, const Lane& lane) const;
  std::vector<NcclTransfer> CombineTransfers(const CudaTokens& tokens, const Lane& lane) const;
  // The transfers of a stage, between the two counts that the watch looks at.
  absl::Status Carry(int lane, WaitStage stage, std::span<const NcclTransfer> transfers,
                     cudaStream_t stream);

  const NcclExchangeConfig config_;
  const NcclApi& api_;
  NcclHandle own_;
  std::string handle_;                         // own_, encoded
  std::vector<std::unique_ptr<Lane>> memory_;  // [num_slots], then the decode path's if any
  PinnedBuffer host_words_;                    // NoWait's, then the watch's [lanes, 2]
  DeviceBuffer report_claim_;                  // u32, WaitControl::report_claim
  NcclLanes lanes_;
  std::unique_ptr<NcclWatch> watch_;  // ends before the communicators and the words do
  bool opened_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_NCCL_EXCHANGE_H_
