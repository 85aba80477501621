#include "server/rpc/message_stream.h"

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
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
    if (ended_) return;
    reading_ = false;
    waits_.Reset();
    if (!ok) return call_->Finish(grpc::Status::OK);
    absl::StatusOr<grpc::ByteBuffer> reply = answer_(incoming_);
    if (!reply.ok()) return call_->Finish(ToGrpcStatus(reply.status()));
    outgoing_ = *std::move(reply);
    call_->StartWrite(outgoing_);
  }
  // Where the write failed, the read does too, and ends the call.
  void OnWriteDone(bool) override {
    reading_ = true;
    call_->StartRead(&incoming_);
  }
  void OnTick(WaitClock::TimePoint now) override {
    if (!reading_ || ended_) return;
    if (!waits_.Exceeds(call_->limits().stream_idle_timeout, now)) return;
    ended_ = true;
    call_->Finish(ToGrpcStatus(StreamIdle(call_->limits())));
  }
  void OnDone() override { delete this; }

  ServerCall* const call_;
  const Answer& answer_;
  grpc::ByteBuffer incoming_;
  grpc::ByteBuffer outgoing_;
  WaitClock waits_;
  bool reading_ = true;
  bool ended_ = false;  // for idling, while a read is in flight
};

}  // namespace

absl::Status StreamIdle(const CallLimits& limits) {
  return absl::UnavailableError(absl::StrCat("server: the stream brought no message for ",
                                             limits.stream_idle_timeout.count(),
                                             " ms; open another, or raise "
                                             "--stream-idle-timeout-ms"));
}

RpcServer::MakeHandler EachAnsweredInBytes(Answer answer) {
  auto shared = std::make_shared<const Answer>(std::move(answer));
  return [shared](ServerCall* call) -> CallHandler* { return new Handler(call, shared.get()); };
}

}  // namespace epserve::server
