// The communicators of one rank and epoch: one a lane, so that the batches of different lanes need
// no common order. (Within one communicator NCCL matches sends and receives by the order of their
// calls, and two batches in flight are enqueued in another order on every rank.) Communicators do
// not block: no call here waits longer than it is told, and Abort() ends any of them.
//
// Thread safety: one thread at a time for a lane, different lanes at once; Open before any
// Exchange; Abort() and CheckErrors() from any thread.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_NCCL_LANES_H_
#define EPSERVE_RUNTIME_ALLTOALLV_NCCL_LANES_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/nccl_api.h"
#include "runtime/base/deadline.h"

namespace epserve::runtime {

// Bytes to and from one peer, in device memory. The peer's transfers, in their order, must have the
// same sizes the other way round; nothing is moved where a size is 0.
struct NcclTransfer {
  int peer = 0;
  const void* send = nullptr;
  std::size_t send_bytes = 0;
  void* recv = nullptr;
  std::size_t recv_bytes = 0;
};

struct NcclLanesConfig {
  int rank = 0;
  int num_ranks = 1;
  int num_lanes = 1;
  int max_blocks = 16;  // of the GPU that one lane's transfers take, at most
};

class NcclLanes {
 public:
  // `api` must outlive the lanes.
  NcclLanes(const NcclApi& api, const NcclLanesConfig& config);
  ~NcclLanes();  // aborts
  NcclLanes(const NcclLanes&) = delete;
  NcclLanes& operator=(const NcclLanes&) = delete;

  // Joins the other ranks, on the current device; all call it at once, with rank 0's id.
  // UNAVAILABLE: one of them has not come by `deadline`. ABORTED: Abort() was called.
  absl::Status Open(const ncclUniqueId& id, const Deadline& deadline);

  // Enqueues all transfers as one. DEADLINE_EXCEEDED: NCCL has not taken them within `timeout`.
  absl::Status Exchange(int lane, std::span<const NcclTransfer> transfers, cudaStream_t stream,
                        absl::Duration timeout);

  // What has gone wrong since, in NCCL's threads or on a peer.
  absl::Status CheckErrors() const;

  // Ends everything that is under way, on the device too, and gives the communicators back. Waits
  // for the device to leave them.
  void Abort();

 private:
  struct Lane {
    std::mutex mutex;           // around each of NCCL's calls with `comm`
    ncclComm_t comm = nullptr;  // null before Open and after Abort
  };

  absl::Status Join(const ncclUniqueId& id, const Deadline& deadline);
  absl::Status Split(Lane& to, const Deadline& deadline);
  absl::Status EnqueueGroup(Lane& lane, std::span<const NcclTransfer> transfers,
                            cudaStream_t stream, bool* in_progress);
  // Waits until NCCL has finished what it was last told. DEADLINE_EXCEEDED at the deadline.
  absl::Status Settle(Lane& lane, const char* call, const Deadline& deadline);
  absl::Status Aborted(const char* call) const;
  ncclConfig_t CommConfig() const;

  const NcclApi& api_;
  const NcclLanesConfig config_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::atomic<bool> aborted_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_NCCL_LANES_H_
