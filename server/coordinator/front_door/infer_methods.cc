#include "server/coordinator/front_door/infer_methods.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/common/grpc_status.h"
#include "server/rpc/message_stream.h"
#include "server/rpc/unary_call.h"

namespace epserve::coordinator {
namespace {

using server::CallHandler;
using server::ServerCall;

constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";

// Ends a call whose reply waits for its caller while others need the memory.
void GiveUp(ServerCall* call) {
  call->GiveUpReply(absl::ResourceExhaustedError(
      "infer: the reply had not been taken when others needed its memory; read replies sooner, or "
      "raise --max-held-bytes"));
}

class UnaryInfer final : public CallHandler {
 public:
  UnaryInfer(ServerCall* call, InferContext& shared)
      : call_(call),
        infer_(
            std::make_shared<InferCall>(shared, InferForm::kUnary, call->connection(),
                                        [this](InferAnswer answer) { Send(std::move(answer)); })) {
    call->StartRead(&request_);
  }

 private:
  void OnReadDone(bool ok) override {
    if (overdue_) return;
    infer_->Start(request_, InferCall::DeadlineOf(call_->context()), ok && !cancelled_);
    // The parsed message holds all that is needed; the wire's bytes would double the memory.
    request_.Clear();
    started_ = true;
  }
  void OnCancel() override {
    cancelled_ = true;
    if (started_) infer_->Cancel();
  }
  void OnTick(server::WaitClock::TimePoint now) override {
    if (started_ || cancelled_) return;
    if (!waits_.Exceeds(call_->limits().message_timeout, now)) return;
    started_ = true;  // What comes of the message now is nobody's.
    overdue_ = true;
    infer_->Fail(server::MessageOverdue(call_->limits()));
  }
  void OnDone() override {
    infer_->ReplyGone();  // Whoever still has the request must not keep it waiting.
    delete this;
  }

  // From any thread, once. Until then the call has not been finished, and so lives.
  void Send(InferAnswer answer) {
    if (answer.retry_pushback_ms > 0) {
      call_->context().AddTrailingMetadata(kPushbackKey, absl::StrCat(answer.retry_pushback_ms));
    }
    if (answer.status.ok()) {
      infer_->AwaitCaller([call = call_] { GiveUp(call); });
      call_->WriteAndFinish(*answer.message);
    } else {
      call_->Finish(server::ToGrpcStatus(answer.status));
    }
  }

  ServerCall* const call_;
  const std::shared_ptr<InferCall> infer_;
  grpc::ByteBuffer request_;
  server::WaitClock waits_;  // this and the next three of the call's queue alone
  bool cancelled_ = false;
  bool started_ = false;
  bool overdue_ = false;
};

class StreamInfer final : public CallHandler, public std::enable_shared_from_this<StreamInfer> {
 public:
  StreamInfer(ServerCall* call, InferContext& shared)
      : call_(call), shared_(shared), deadline_(InferCall::DeadlineOf(call->context())) {}

  void Begin() {
    self_ = shared_from_this();
    call_->StartRead(&incoming_);
  }

 private:
  struct Entry {
    std::shared_ptr<InferCall> infer;
    std::int64_t request_bytes = 0;
    ReplyBytes reply;    // null: it has not been answered
    bool waits = false;  // for the caller, itself or behind the one that is being sent
  };

  void OnReadDone(bool ok) override {
    if (!ok) {
      std::unique_lock lock(mutex_);
      reading_ = false;
      no_more_requests_ = true;
      return Continue(lock);
    }
    auto entry = std::make_shared<Entry>();
    entry->request_bytes = static_cast<std::int64_t>(incoming_.Length());
    entry->infer = std::make_shared<InferCall>(
        shared_, InferForm::kStream, call_->connection(),
        [self = shared_from_this(), entry = entry.get()](InferAnswer answer) {
          self->Answered(entry, std::move(answer));
        });
    bool cancelled = false;
    {
      const std::lock_guard lock(mutex_);
      if (finished_) return;  // It came as the stream was ended for idling.
      waits_.Reset();
      cancelled = cancelled_;
      held_bytes_ += entry->request_bytes;
      entries_.push_back(entry);
    }
    entry->infer->Start(incoming_, deadline_, !cancelled);
    incoming_.Clear();
    std::unique_lock lock(mutex_);
    reading_ = false;
    Continue(lock, /*within_read=*/true);
  }

  void OnTick(server::WaitClock::TimePoint now) override {
    std::unique_lock lock(mutex_);
    const bool idle = entries_.empty() && reading_ && !finished_ && !cancelled_;
    if (!idle) return waits_.Reset();
    if (!waits_.Exceeds(call_->limits().stream_idle_timeout, now)) return;
    Finish(server::ToGrpcStatus(server::StreamIdle(call_->limits())));
  }

  void OnWriteDone(bool) override {
    std::unique_lock lock(mutex_);
    writing_ = false;
    held_bytes_ -= entries_.front()->request_bytes;
    entries_.front()->infer->ReplyGone();
    entries_.pop_front();
    Continue(lock);
  }

  void OnCancel() override {
    std::vector<std::shared_ptr<InferCall>> under_way;
    {
      const std::lock_guard lock(mutex_);
      cancelled_ = true;
      for (const auto& entry : entries_) {
        if (entry->reply == nullptr) under_way.push_back(entry->infer);
      }
    }
    for (const auto& infer : under_way) infer->Cancel();
    std::unique_lock lock(mutex_);
    Continue(lock);
  }

  void OnDone() override {
    const std::shared_ptr<StreamInfer> last = std::move(self_);
    const std::lock_guard lock(mutex_);
    for (const auto& entry : entries_) entry->infer->ReplyGone();
  }

  // `entry` is among the entries until its reply has been sent.
  void Answered(Entry* entry, InferAnswer answer) {
    std::unique_lock lock(mutex_);
    entry->reply = std::move(answer.message);
    if (writing_) AwaitCaller(*entry);
    Continue(lock);
  }

  // Starts what is due: the next write, the next read, or the end. An operation may be started
  // under the lock: it reports from the call's queue, never from within the call.
  void Continue(std::unique_lock<std::mutex>&, bool within_read = false) {
    if (finished_) return;
    const bool answered = !entries_.empty() && entries_.front()->reply != nullptr;
    if (cancelled_) {
      // Nobody reads any more; the requests have been cancelled, and answer into entries that stay.
      if (!writing_) Finish(grpc::Status(grpc::StatusCode::CANCELLED, "the caller has gone"));
      return;
    }
    if (!writing_ && answered) {
      writing_ = true;
      for (const auto& entry : entries_) AwaitCaller(*entry);
      call_->StartWrite(*entries_.front()->reply);
    }
    if (no_more_requests_) {
      if (entries_.empty()) Finish(grpc::Status::OK);
      return;
    }
    const bool room = entries_.size() < kMaxStreamRequests && held_bytes_ < kMaxStreamBytes;
    if (!reading_ && room) {
      reading_ = true;
      if (within_read && entries_.size() == 1) {
        call_->StartReadAfterWrite(&incoming_);
      } else {
        call_->StartRead(&incoming_);
      }
    }
  }
  // A small reply that is not read holds up large ones, so all make room, not the first alone.
  void AwaitCaller(Entry& entry) {
    if (entry.reply == nullptr || std::exchange(entry.waits, true)) return;
    entry.infer->AwaitCaller([call = call_] { GiveUp(call); });
  }
  void Finish(const grpc::Status& status) {
    finished_ = true;
    call_->Finish(status);
  }

  ServerCall* const call_;
  InferContext& shared_;
  const InferCall::Clock::time_point deadline_;
  std::shared_ptr<StreamInfer> self_;  // until OnDone
  grpc::ByteBuffer incoming_;          // of the read in flight

  std::mutex mutex_;
  std::deque<std::shared_ptr<Entry>> entries_;  // Guarded by mutex_, as all below; oldest first.
  std::int64_t held_bytes_ = 0;
  server::WaitClock waits_;
  bool reading_ = true;
  bool writing_ = false;
  bool no_more_requests_ = false;
  bool cancelled_ = false;
  bool finished_ = false;
};

}  // namespace

CallHandler* StartUnaryInfer(ServerCall* call, InferContext& shared) {
  return new UnaryInfer(call, shared);
}

CallHandler* StartStreamInfer(ServerCall* call, InferContext& shared) {
  auto stream = std::make_shared<StreamInfer>(call, shared);
  stream->Begin();
  return stream.get();
}

}  // namespace epserve::coordinator
