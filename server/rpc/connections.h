// The connections that a server of this process has taken, where gRPC offers no way to end them.
#ifndef EPSERVE_SERVER_RPC_CONNECTIONS_H_
#define EPSERVE_SERVER_RPC_CONNECTIONS_H_

#include <string>

namespace epserve::server {

// Shuts down both ways, without closing, every connection that this process accepted at `address`,
// HOST:PORT, which is bound to `port`, or unix:PATH. Whoever polls them learns that they ended;
// what was sent before still arrives. Listening sockets are left alone. Thread-safe.
void EndConnections(const std::string& address, int port);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_CONNECTIONS_H_
