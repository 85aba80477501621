// Bidirectional streams over RpcServer on which each request is answered at once, one after
// another.
#ifndef EPSERVE_SERVER_RPC_MESSAGE_STREAM_H_
#define EPSERVE_SERVER_RPC_MESSAGE_STREAM_H_

#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/rpc/messages.h"
#include "server/rpc/rpc_server.h"

namespace epserve::server {

// What a stream gets that idles for longer than `limits` allow.
absl::Status StreamIdle(const CallLimits& limits);

// The reply to each message, as bytes; an error ends the stream with it. Must not block. The next
// message is read once the reply has gone, so that a caller who does not read holds one reply.
RpcServer::MakeHandler EachAnsweredInBytes(
    std::function<absl::StatusOr<grpc::ByteBuffer>(const grpc::ByteBuffer&)> answer);

// As above for one type of message each way: `answer(request)` gives the reply.
template <typename Request, typename Response, typename Answer>
RpcServer::MakeHandler EachAnswered(Answer answer) {
  return EachAnsweredInBytes(
      [answer =
           std::move(answer)](const grpc::ByteBuffer& bytes) -> absl::StatusOr<grpc::ByteBuffer> {
        Request request;
        absl::Status status = ParseMessage(bytes, &request);
        if (!status.ok()) return status;
        grpc::ByteBuffer reply;
        const Response response = answer(request);
        status = SerializeMessage(response, &reply);
        if (!status.ok()) return status;
        return reply;
      });
}

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_MESSAGE_STREAM_H_
