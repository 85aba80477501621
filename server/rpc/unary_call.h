// Calls with one request and one reply, over RpcServer.
#ifndef EPSERVE_SERVER_RPC_UNARY_CALL_H_
#define EPSERVE_SERVER_RPC_UNARY_CALL_H_

#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "runtime/base/status.h"
#include "server/common/grpc_status.h"
#include "server/rpc/messages.h"
#include "server/rpc/rpc_server.h"

namespace epserve::server {

// What a call gets whose one message takes longer than `limits` allow.
absl::Status MessageOverdue(const CallLimits& limits);

// One call that is to be answered once, from any thread, now or later. Destroyed unanswered it
// answers INTERNAL, so that no caller waits for ever.
class UnaryCall {
 public:
  explicit UnaryCall(ServerCall* call) : call_(call) {}
  UnaryCall(UnaryCall&& other) noexcept : call_(std::exchange(other.call_, nullptr)) {}
  UnaryCall& operator=(UnaryCall&&) = delete;
  ~UnaryCall();

  std::string peer() const { return call_->context().peer(); }
  // Valid until the answer.
  grpc::ServerContext& context() const { return call_->context(); }
  void Fail(const absl::Status& status);  // REQUIRES: not OK
  template <typename Response>
  void Reply(const Response& response) {
    grpc::ByteBuffer bytes;
    const absl::Status status = SerializeMessage(response, &bytes);
    if (!status.ok()) return Fail(status);
    std::exchange(call_, nullptr)->WriteAndFinish(bytes);
  }

 private:
  ServerCall* call_;  // null: answered
};

// `answer` gets the request's bytes once they have come; a caller that goes before that is answered
// CANCELLED here.
RpcServer::MakeHandler UnaryHandler(
    std::function<void(UnaryCall call, const grpc::ByteBuffer& request)> answer);

// Parses, lets `fill(request, &response)` do the work at once, and answers.
template <typename Request, typename Response, typename Fill>
RpcServer::MakeHandler UnaryHandler(Fill fill) {
  return UnaryHandler([fill = std::move(fill)](UnaryCall call, const grpc::ByteBuffer& bytes) {
    Request request;
    Response response;
    absl::Status status = ParseMessage(bytes, &request);
    if (status.ok()) status = fill(request, &response);
    if (!status.ok()) return call.Fail(status);
    call.Reply(response);
  });
}

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_UNARY_CALL_H_
