// One slot of the cuda engine: a shard from Stage to Finish on a stream of its own, with every
// buffer it needs, taken at start. Used by one thread at a time. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_SLOT_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_SLOT_H_

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/device_exchange.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/base/cuda_stream.h"
#include "runtime/engine/cuda_routing.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/shard_slot.h"
#include "runtime/experts/cuda_expert_ffn.h"

namespace epserve::runtime {

struct CudaSlotConfig {
  ShardIntake::Config intake;
  CudaFfnShape shape;         // num_local_experts may be 0: nothing is computed then
  std::int64_t max_rows = 0;  // token-expert pairs of one rank and batch at most
  RowPayload payload = RowPayload::kCopy;
};

class CudaSlot final : public ShardSlot {
 public:
  // On the current device, as are all calls. RESOURCE_EXHAUSTED: the device is full.
  static absl::StatusOr<std::unique_ptr<CudaSlot>> Create(const CudaSlotConfig& config);
  // What a slot of `config` takes from the device.
  static std::uint64_t PlanBytes(const CudaSlotConfig& config);

  // Each enqueues and returns, but for the count exchange. `index` is this slot's.
  absl::Status EnqueueStage();
  // Waits for the peers, but no longer than `timeout`.
  absl::StatusOr<CountMatrix> ExchangeCounts(DeviceExchange& exchange, int index,
                                             absl::Duration timeout);
  absl::Status EnqueueDispatch(DeviceExchange& exchange, int index, const CountMatrix& counts,
                               std::int64_t first_expert);
  // As EnqueueDispatch, where the counts go with the rows. REQUIRES: topk is the model's at most.
  absl::Status EnqueueUncounted(DeviceExchange& exchange, int index);
  absl::Status EnqueueExperts(DeviceExchange& exchange, int index, const std::byte* layer);
  absl::Status EnqueueCombine(DeviceExchange& exchange, int index);

  // Copies parts of device memory, no more than a shard has, to the host, and waits. Before
  // EnqueueStage. DEADLINE_EXCEEDED: the device hangs.
  absl::Status Read(std::span<const DeviceRead> reads, absl::Duration timeout);

  // Copies the output to `output` (memory of the host or of the device; null: all rows have gone to
  // device regions) and waits for all of it. DEADLINE_EXCEEDED or ABORTED: a device wait gave up;
  // the exchange is aborted then.
  absl::Status Finish(DeviceExchange& exchange, int index, void* output, absl::Duration timeout);

  // Waits until nothing of this slot is on the device any more. DEADLINE_EXCEEDED after `timeout`:
  // the device hangs, and nothing that this slot uses may be freed.
  absl::Status Drain(absl::Duration timeout);

  // True from ExchangeCounts or Dispatch on, when peers count on this rank's part in the batch.
  bool engaged() const { return engaged_; }
  void Disengage() { engaged_ = false; }
  const std::vector<std::int64_t>& local_expert_rows() const { return local_expert_rows_; }
  std::span<const RoutingFault> routing_faults() const { return routing_faults_; }

 private:
  // Where a timing event stands in a batch.
  enum Mark : int { kDispatchBegin, kDispatchEnd, kExpertsEnd, kCombineBegin, kCombineEnd, kDone };
  static constexpr int kNumMarks = kDone + 1;

  explicit CudaSlot(const CudaSlotConfig& config);
  absl::Status Initialize();
  // The rows that come from the host go to input_; true where they are staged for a copy.
  absl::StatusOr<bool> EnqueueHostRows();
  // The routing that lies in device regions goes to `ids` and `weights` [T, K].
  absl::Status EnqueueDeviceRouting(std::int32_t* ids, float* weights);
  void TakeRoutingFaults();
  std::size_t RowBytes() const;  // of the request's type
  absl::Status Mark(Mark mark) { return marks_[mark].Record(stream_.get()); }
  absl::Status WaitForDone(DeviceExchange* exchange, absl::Duration timeout);
  absl::StatusOr<std::int64_t> ElapsedNs(enum Mark begin, enum Mark end) const;
  absl::Status TakeTimes();

  const CudaSlotConfig config_;
  Stream stream_;
  std::array<Event, kNumMarks> marks_;
  // What came in, in one piece on either side, so that one copy takes it over: rows [T, H] in the
  // request's type, ids [T, K] i32, weights [T, K] f32, each from a multiple of kPartAlignment. The
  // output, where it is not bf16, takes the rows' place.
  PinnedBuffer staging_;
  DeviceBuffer input_;
  DeviceBuffer x_;                      // [T, H] bf16, of a request in another type
  DeviceBuffer expert_inputs_;          // [max_rows, H] bf16
  DeviceBuffer expert_rows_;            // [max_rows, H] bf16
  DeviceBuffer out_;                    // [T, H] bf16
  std::unique_ptr<CudaExpertFfn> ffn_;  // null without local experts
  PinnedBuffer reports_;                // RoutingReport [kMaxRoutedPieces]
  CudaTokens tokens_;
  std::vector<RoutingFault> routing_faults_;
  std::vector<std::int64_t> local_expert_rows_;  // [E_local]
  bool uncounted_ = false;
  bool engaged_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_SLOT_H_
