// The Admin service: cluster status, placement, per-expert load, draining a worker. Asks the host;
// never blocks.
#ifndef EPSERVE_SERVER_COORDINATOR_ADMIN_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_ADMIN_SERVICE_H_

#include <string>

#include "server/coordinator/host.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

struct AdminInfo {
  std::string cluster_id;
  std::string version;
  std::string model_name;
};

// `host` outlives the server's Stop().
void AddAdminService(Host* host, AdminInfo info, server::RpcServer* server);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ADMIN_SERVICE_H_
