#include "server/rpc/unary_call.h"

#include "absl/strings/str_cat.h"

namespace epserve::server {
namespace {

class Handler final : public CallHandler {
 public:
  Handler(ServerCall* call, const std::function<void(UnaryCall, const grpc::ByteBuffer&)>* answer)
      : call_(call), answer_(*answer) {
    call->StartRead(&request_);
  }

 private:
  void OnReadDone(bool ok) override {
    if (std::exchange(ended_, true)) return;
    UnaryCall call(call_);
    if (!ok) {
      // A caller that has gone hears nothing of it; one that has not has sent none.
      return call.Fail(absl::InvalidArgumentError(
          "server: the call has no message; send exactly one and then end the call"));
    }
    answer_(std::move(call), request_);
    request_.Clear();
  }
  void OnTick(WaitClock::TimePoint now) override {
    if (ended_ || !waits_.Exceeds(call_->limits().message_timeout, now)) return;
    ended_ = true;
    call_->Finish(ToGrpcStatus(MessageOverdue(call_->limits())));
  }
  void OnDone() override { delete this; }

  ServerCall* const call_;
  const std::function<void(UnaryCall, const grpc::ByteBuffer&)>& answer_;
  grpc::ByteBuffer request_;
  WaitClock waits_;
  bool ended_ = false;  // the message came, or was waited for too long
};

}  // namespace

absl::Status MessageOverdue(const CallLimits& limits) {
  return absl::DeadlineExceededError(absl::StrCat(
      "server: the call's message had not come whole after ", limits.message_timeout.count(),
      " ms; send it sooner, or raise --message-timeout-ms"));
}

UnaryCall::~UnaryCall() {
  if (call_ != nullptr) Fail(absl::InternalError("the call was dropped without an answer"));
}

void UnaryCall::Fail(const absl::Status& status) {
  std::exchange(call_, nullptr)->Finish(ToGrpcStatus(status));
}

RpcServer::MakeHandler UnaryHandler(
    std::function<void(UnaryCall call, const grpc::ByteBuffer& request)> answer) {
  auto shared = std::make_shared<const std::function<void(UnaryCall, const grpc::ByteBuffer&)>>(
      std::move(answer));
  return [shared](ServerCall* call) -> CallHandler* { return new Handler(call, shared.get()); };
}

}  // namespace epserve::server
