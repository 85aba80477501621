// The connections that a server of this process has taken, where gRPC offers no way to end them.
#ifndef EPSERVE_SERVER_RPC_CONNECTIONS_H_
#define EPSERVE_SERVER_RPC_CONNECTIONS_H_

#include <string>
#include <vector>

#include "server/rpc/half_messages.h"

namespace epserve::server {

// Shuts down both ways, without closing, every connection that this process accepted at `address`,
// HOST:PORT, which is bound to `port`, or unix:PATH. Whoever polls them learns that they ended;
// what was sent before still arrives. Listening sockets are left alone. Thread-safe.
void EndConnections(const std::string& address, int port);

// The other ends, named as in "ipv4:192.0.2.1:999" and "ipv6:%5B::1%5D:999", of those TCP
// connections that this process accepted at `port`, and that are as one is in the midst of its TLS
// handshake: something has come a moment ago, and not much in all. New connections whose handshake
// has succeeded may be among them. Thread-safe.
std::vector<std::string> PeersInHandshake(int port);

// What has come over each TCP connection that this process accepted at `port`. A connection's name
// is gRPC's. Thread-safe.
std::vector<HalfMessages::Received> ReceivedBytes(int port);

// As EndConnections(), of the connection with that other end alone.
void EndConnectionOf(const std::string& peer, int port);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_CONNECTIONS_H_
