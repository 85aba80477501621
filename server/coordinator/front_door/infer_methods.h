// ModelInfer and ModelStreamInfer over RpcServer. A stream's requests run side by side, its replies
// come in the order of the requests, and what it holds is bounded: once so many requests are
// without a reply that was sent, no more are read until the caller takes replies.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_METHODS_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_METHODS_H_

#include "server/coordinator/front_door/infer_call.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

// Requests of one stream that may be under way or wait to be sent back.
inline constexpr int kMaxStreamRequests = 64;
// Bytes of such requests from which on no more are read.
inline constexpr std::int64_t kMaxStreamBytes = std::int64_t{64} << 20;

// Handlers of one call; they answer by themselves and delete themselves.
server::CallHandler* StartUnaryInfer(server::ServerCall* call, InferContext& shared);
server::CallHandler* StartStreamInfer(server::ServerCall* call, InferContext& shared);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_METHODS_H_
