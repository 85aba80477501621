// What every client of this library does with gRPC in the same way: its channel and its Status.
// Internal to client/cpp and client/command; no part of the library's public face.
#ifndef EPSERVE_CLIENT_CPP_CHANNEL_H_
#define EPSERVE_CLIENT_CPP_CHANNEL_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/status.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cpp/channel_security.h"

namespace epserve::client {

// A channel to "host:port" or "unix:/path", without a limit on messages but the protocol's, without
// proxies, and quick to reconnect: attempts are at most `max_reconnect_backoff` apart, give or take
// a fifth. Connecting happens on first use.
std::shared_ptr<grpc::Channel> CreateServiceChannel(const std::string& target,
                                                    const ChannelSecurity& security,
                                                    absl::Duration max_reconnect_backoff);

// The same code and message.
absl::Status FromGrpcStatus(const grpc::Status& status);

// Where the last attempt to connect has failed, waits up to 100 ms, and not past `deadline`, for
// the next one: gRPC looks at how that goes while some thread waits on the channel, and otherwise
// every 5 s; calls that fail at once would keep a server that is back away for as long.
void AwaitReconnect(grpc::Channel& channel, absl::Time deadline);

// Before each call that blocks: AwaitReconnect, and `timeout` from now for both. An infinite one
// sets no deadline.
void StartCall(grpc::Channel& channel, grpc::ClientContext& context, absl::Duration timeout);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CHANNEL_H_
