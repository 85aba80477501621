// Hands the descriptors of clients' regions to the workers of this machine, by the regions'
// numbers: so a worker opens nothing by a name that a client chose, and what the registry has
// checked is what it gets. Over a Unix socket beside the shared memory itself, which whoever shares
// that can reach.
//
// Thread-safe: the registry is, and nothing else is touched after Start.
#ifndef EPSERVE_SERVER_COORDINATOR_REGION_SERVER_H_
#define EPSERVE_SERVER_COORDINATOR_REGION_SERVER_H_

#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "runtime/symmetric/handle_socket.h"
#include "server/coordinator/front_door/shm_registry.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

class RegionServer {
 public:
  // Removes what killed coordinators of the cluster have left. `registry` outlives the server.
  static absl::StatusOr<std::unique_ptr<RegionServer>> Start(const std::string& cluster_id,
                                                             const ShmRegistry* registry);

  const RegionAccess& access() const { return access_; }

 private:
  RegionServer(RegionAccess access, std::unique_ptr<runtime::HandleServer> socket)
      : access_(std::move(access)), socket_(std::move(socket)) {}

  const RegionAccess access_;
  const std::unique_ptr<runtime::HandleServer> socket_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_REGION_SERVER_H_
