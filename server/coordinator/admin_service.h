// The Admin service: cluster status, placement, per-expert load, draining a worker. Asks the host;
// never blocks.
#ifndef EPSERVE_SERVER_COORDINATOR_ADMIN_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_ADMIN_SERVICE_H_

#include <grpcpp/impl/service_type.h>

#include <memory>
#include <string>

#include "server/coordinator/host.h"

namespace epserve::coordinator {

struct AdminInfo {
  std::string cluster_id;
  std::string version;
  std::string model_name;
};

// `host` outlives the service and the server that it is registered with.
std::unique_ptr<grpc::Service> CreateAdminService(Host* host, AdminInfo info);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ADMIN_SERVICE_H_
