#include "server/rpc/message_stream.h"

#include <memory>

#include "server/common/grpc_status.h"

namespace epserve::server {
namespace {

using Answer = std::function<absl::StatusOr<grpc::ByteBuffer>(const grpc::ByteBuffer&)>;

// All calls come from the queue's one thread, and nothing is started from another: no lock.
class Handler final : public CallHandler {
 public:
  Handler(ServerCall* call, const Answer* answer) : call_(call), answer_(*answer) {
    call->StartRead(&incoming_);
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return call_->Finish(grpc::Status::OK);
    absl::StatusOr<grpc::ByteBuffer> reply = answer_(incoming_);
    if (!reply.ok()) return call_->Finish(ToGrpcStatus(reply.status()));
    outgoing_ = *std::move(reply);
    call_->StartWrite(outgoing_);
  }
  // Where the write failed, the read does too, and ends the call.
  void OnWriteDone(bool) override { call_->StartRead(&incoming_); }
  void OnDone() override { delete this; }

  ServerCall* const call_;
  const Answer& answer_;
  grpc::ByteBuffer incoming_;
  grpc::ByteBuffer outgoing_;
};

}  // namespace

RpcServer::MakeHandler EachAnsweredInBytes(Answer answer) {
  auto shared = std::make_shared<const Answer>(std::move(answer));
  return [shared](ServerCall* call) -> CallHandler* { return new Handler(call, shared.get()); };
}

}  // namespace epserve::server
