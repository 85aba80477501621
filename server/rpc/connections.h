// The connections that a server of this process has taken, where gRPC offers no way to end them.
#ifndef EPSERVE_SERVER_RPC_CONNECTIONS_H_
#define EPSERVE_SERVER_RPC_CONNECTIONS_H_

#include <string>
#include <vector>

namespace epserve::server {

// Shuts down both ways, without closing, every connection that this process accepted at `address`,
// HOST:PORT, which is bound to `port`, or unix:PATH. Whoever polls them learns that they ended;
// what was sent before still arrives. Listening sockets are left alone. Thread-safe.
void EndConnections(const std::string& address, int port);

// "ADDRESS:PORT" of the other ends of those TCP connections that this process accepted at `port`,
// and that are as one is in the midst of its TLS handshake: something has come a moment ago, and
// not much in all. New connections whose handshake has succeeded may be among them. Thread-safe.
std::vector<std::string> PeersInHandshake(int port);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_CONNECTIONS_H_
