// Server reflection (grpc.reflection.v1alpha) over RpcServer, from the descriptors that are
// compiled in. Thread-safe.
#ifndef EPSERVE_SERVER_RPC_REFLECTION_SERVICE_H_
#define EPSERVE_SERVER_RPC_REFLECTION_SERVICE_H_

#include "server/rpc/rpc_server.h"

namespace epserve::server {

// Lists the services that `server` has at this moment, and its own: call it last.
void AddReflection(RpcServer* server);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_REFLECTION_SERVICE_H_
