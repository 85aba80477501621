// gRPC's own log lines, put among ours, and what two of them tell that nothing else does: a refused
// handshake, and the loss of a listening socket. Thread-safe.
#ifndef EPSERVE_SERVER_COORDINATOR_GRPC_LOG_H_
#define EPSERVE_SERVER_COORDINATOR_GRPC_LOG_H_

#include <functional>
#include <string>

namespace epserve::coordinator {

// Before the process's first server; once is enough.
void TakeGrpcLog();

// `on_refused` is called, within each TLS handshake of a server that fails and in its thread, with
// what OpenSSL says of it. Null: nobody is called, and it is logged.
void SetOnHandshakeRefused(std::function<void(const std::string& cause)> on_refused);

// `on_lost` is called, from any thread, each time that gRPC has given up a listening socket. gRPC
// 1.51 does so for good at the first failed accept(), which is what a process without a free file
// descriptor gets: the connections that there are go on, but nobody new comes in ever again. Null:
// nobody is called.
void SetOnListenerLost(std::function<void()> on_lost);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_GRPC_LOG_H_
