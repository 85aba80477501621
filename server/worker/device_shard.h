// What of a shard lies in clients' CUDA memory: where it is, and its ids and weights, which nobody
// has validated before this worker does. Where all of them lie there, and the engine can dispatch
// the batch uncounted, it reads and validates them on the device; else they come to the host.
//
// Used by one thread at a time, for one shard after another: its buffers stay.
#ifndef EPSERVE_SERVER_WORKER_DEVICE_SHARD_H_
#define EPSERVE_SERVER_WORKER_DEVICE_SHARD_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "runtime/engine/device_regions.h"
#include "runtime/engine/engine.h"
#include "server/worker/control_messages.h"
#include "server/worker/open_device_regions.h"

namespace epserve::worker {

class DeviceShard {
 public:
  // Finds the shard's device rows, and keeps their regions open until Release(). `regions` may be
  // null where the shard has none.
  absl::Status Locate(const Shard& shard, std::int64_t row_bytes, const OpenDeviceRegions* regions);
  void Release();

  // For ShardInput; valid until Release().
  std::span<const runtime::ShardDeviceRows> rows() const { return rows_; }

  // Leaves ids and weights to the engine, as part of rows(), or copies them to private memory and
  // then validates those that lie on the device. Rows of a request that are wrong become a fault,
  // name no expert where their ids were not known before, and weigh nothing. `ids` and `weights`:
  // those of the shard that lie on the host, in their places.
  absl::Status TakeRouting(const Shard& shard, runtime::Engine& engine, const std::int32_t* ids,
                           const float* weights, std::vector<RegionFault>& faults);
  // After TakeRouting that brought any from the device; null before.
  const std::int32_t* topk_ids() const { return ids_.empty() ? nullptr : ids_.data(); }
  const float* topk_weights() const { return weights_.empty() ? nullptr : weights_.data(); }
  // After TakeRouting: they have been left to the engine.
  bool routing_left() const { return runtime::NumRoutedIn(rows_) > 0; }
  // What the engine found wrong with them, as faults of their requests.
  static void TellFaults(const Shard& shard, std::int64_t num_experts,
                         std::span<const runtime::RoutingFault> found,
                         std::vector<RegionFault>& faults);

  // Brings the hidden states that lie on the device to their places in [host_rows, + the shard's):
  // where no ids are given, the router reads them there.
  absl::Status FetchHidden(const Shard& shard, runtime::Engine& engine, std::int64_t row_bytes,
                           std::byte* host_rows);

 private:
  struct Routing {
    const std::byte* ids = nullptr;
    const std::byte* weights = nullptr;
  };

  absl::StatusOr<std::byte*> Find(const std::optional<server::DevicePlace>& place,
                                  std::int64_t bytes, const OpenDeviceRegions& regions);
  bool LeaveRouting(const Shard& shard, const runtime::Engine& engine);
  absl::Status ReadRouting(const Shard& shard, runtime::Engine& engine);
  absl::Status CheckIds(const DeviceRows& part, int topk, std::int64_t num_experts);
  absl::Status CheckWeights(const DeviceRows& part, int topk) const;

  std::vector<runtime::ShardDeviceRows> rows_;  // as Shard::device_rows
  std::vector<Routing> routing_;                // as Shard::device_rows
  std::vector<std::shared_ptr<const runtime::DeviceRegion>> held_;
  std::vector<std::int32_t> ids_;       // [T, K]
  std::vector<float> weights_;          // [T, K]
  std::vector<std::int64_t> wide_ids_;  // [T, K]
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_DEVICE_SHARD_H_
