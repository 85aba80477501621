// Who has the workers open clients' CUDA memory: the coordinator's host, or a fake in a test.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_DEVICE_REGION_HOST_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_DEVICE_REGION_HOST_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {

// Thread-safe. No call blocks; `done` is called once, within the call or later, from any thread,
// and must not block.
class DeviceRegionHost {
 public:
  using Done = std::function<void(const absl::Status&)>;

  virtual ~DeviceRegionHost() = default;

  // Answers once every worker that serves has the region open, or one has said why it has not.
  // UNAVAILABLE: the service does not serve, or ceased to meanwhile.
  virtual void OpenDeviceRegion(std::shared_ptr<const ShmRegion> region, Done done) = 0;

  // Answers once no worker has any of them mapped, nor any region of a closing that was asked for
  // before. Nobody may use them any more. May be empty. DEADLINE_EXCEEDED: batches in flight or a
  // worker take too long.
  virtual void CloseDeviceRegions(std::vector<std::uint64_t> regions, Done done) = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_DEVICE_REGION_HOST_H_
