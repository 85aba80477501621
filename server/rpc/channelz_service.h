// grpc.channelz.v1 over RpcServer: what gRPC's core knows of its own servers, channels and sockets.
// Thread-safe.
#ifndef EPSERVE_SERVER_RPC_CHANNELZ_SERVICE_H_
#define EPSERVE_SERVER_RPC_CHANNELZ_SERVICE_H_

#include "server/rpc/rpc_server.h"

namespace epserve::server {

void AddChannelz(RpcServer* server);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_CHANNELZ_SERVICE_H_
