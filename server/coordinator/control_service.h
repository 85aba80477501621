// The Control service: one bidirectional stream a worker. Converts and posts to the host; never
// blocks.
#ifndef EPSERVE_SERVER_COORDINATOR_CONTROL_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_CONTROL_SERVICE_H_

#include "server/coordinator/hello_check.h"
#include "server/coordinator/host.h"
#include "server/coordinator/refusals.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

// `host` and `refusals` outlive the server's Stop().
void AddControlService(Host* host, HelloPolicy policy, Refusals* refusals,
                       server::RpcServer* server);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_CONTROL_SERVICE_H_
