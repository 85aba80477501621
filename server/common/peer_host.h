// Who is behind a connection, for limits that one caller must not get round: its host, without the
// port, which is another for each connection.
#ifndef EPSERVE_SERVER_COMMON_PEER_HOST_H_
#define EPSERVE_SERVER_COMMON_PEER_HOST_H_

#include <string>
#include <string_view>

namespace epserve::server {

// `peer` as gRPC names it ("ipv4:192.0.2.1:999", "ipv6:%5B2001:db8::1%5D:999", "unix:..."), or
// ADDRESS or ADDRESS:PORT. An IPv6 address counts by its first 64 bits, the least that one customer
// is given, any of whose other 64 it may call from. All callers over Unix sockets are one. What is
// none of these stays as it is.
std::string PeerHost(std::string_view peer);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_PEER_HOST_H_
