// The other side of what is measured: bare gRPC, messages as bytes, one queue and one thread.
#ifndef EPSERVE_SERVER_MICROBENCH_ECHO_PEER_H_
#define EPSERVE_SERVER_MICROBENCH_ECHO_PEER_H_

#include <grpcpp/channel.h>
#include <grpcpp/server_builder.h>

#include <memory>
#include <string>

#include "absl/status/status.h"

namespace epserve::microbench {

// Methods; a stream's messages are each answered with themselves.
inline constexpr char kUnaryMethod[] = "/epserve.microbench.Echo/Unary";
inline constexpr char kStreamMethod[] = "/epserve.microbench.Echo/Stream";

// Large messages without a wait for the receiver to widen its window, as in the service.
std::shared_ptr<grpc::Channel> EchoChannel(const std::string& target);
void ApplyEchoLimits(grpc::ServerBuilder& builder);

// Answers both methods at unix:`socket_path` and at a TCP port of 127.0.0.1 that it writes to
// `port_fd`, as a line. Returns only with an error.
absl::Status ServeEcho(const std::string& socket_path, int port_fd);

// Answers each message that comes on one stream to `target` with itself, until it ends (OK).
absl::Status WorkAsEcho(const std::string& target);

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_ECHO_PEER_H_
