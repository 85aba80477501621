#include "client/cpp/async_infer_stream.h"

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>

#include <deque>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/cpp/channel.h"
#include "client/cpp/infer_message.h"
#include "client/cpp/infer_wire.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

// The call, which lives on after its handle until what is under way has ended. At most one write
// and one read are: gRPC takes no more. The mutex guards what senders and the thread share;
// callbacks run outside it.
class StreamCall final : public std::enable_shared_from_this<StreamCall> {
 public:
  StreamCall(std::shared_ptr<grpc::Channel> channel, std::shared_ptr<CompletionThread> thread,
             const StreamOptions& options)
      : thread_(std::move(thread)),
        channel_(std::move(channel)),
        max_under_way_(options.max_under_way) {
    const absl::Time deadline = absl::Now() + options.timeout;
    if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
    for (const auto& [key, value] : options.metadata) context_.AddMetadata(key, value);
  }

  void Open() {
    absl::MutexLock lock(&mutex_);
    stream_ =
        grpc::GenericStub(channel_).PrepareCall(&context_, kStreamInferMethod, thread_->queue());
    stream_->StartCall(opening_.Begin());
  }

  absl::Status Send(const InferRequest& request, InferCallback done, TensorBytes spare) {
    EPC_ASSIGN_OR_RETURN(const RequestParts parts, ToMessage(request));
    grpc::ByteBuffer message = Serialize(parts);
    absl::MutexLock lock(&mutex_);
    if (ended_by_caller_) {
      return absl::FailedPreconditionError("infer stream: End was called; open another");
    }
    if (broken_) {
      return absl::UnavailableError(
          absl::StrCat("infer stream: it has ended", end_.ok() ? "" : ": ", end_.message()));
    }
    if (max_under_way_ == 0) {
      return absl::InvalidArgumentError(
          "infer stream: max_under_way 0 is below 1: nothing could be sent; open it with more");
    }
    if (owed_.size() >= max_under_way_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("infer stream: ", owed_.size(),
                       " requests are under way, as many as max_under_way allows; send the next "
                       "once one is answered"));
    }
    owed_.push_back({ExpectedOf(request), std::move(done), SpareOf(std::move(spare))});
    unsent_.push_back(std::move(message));
    Pump();
    return absl::OkStatus();
  }

  void End() {
    absl::MutexLock lock(&mutex_);
    ended_by_caller_ = true;
    Pump();
  }

  void Cancel() { context_.TryCancel(); }

 private:
  struct Owed {
    ExpectedOutput expected;
    InferCallback done;
    TensorBytes spare;
  };

  // One of the call's operations, which keeps the call while it is under way.
  class Event final : public CompletionThread::Operation {
   public:
    Event(StreamCall* call, void (StreamCall::*done)(bool)) : call_(call), done_(done) {}
    void* Begin() ABSL_EXCLUSIVE_LOCKS_REQUIRED(call_->mutex_) {
      held_ = call_->shared_from_this();
      return static_cast<CompletionThread::Operation*>(this);
    }
    void Done(bool ok) override {
      std::shared_ptr<StreamCall> held;
      {
        absl::MutexLock lock(&call_->mutex_);
        held = std::move(held_);
      }
      (held.get()->*done_)(ok);
    }

   private:
    StreamCall* const call_;
    void (StreamCall::*const done_)(bool);
    std::shared_ptr<StreamCall> held_ ABSL_GUARDED_BY(call_->mutex_);
  };

  // Starts what can be started. The write before the read: gRPC answers a message on a stream that
  // is being read with a window update of its own, which otherwise rides on the write.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!opened_ || finishing_) return;
    if (!writing_ && !broken_) {
      if (!unsent_.empty()) {
        writing_ = true;
        stream_->Write(unsent_.front(), write_.Begin());
        unsent_.pop_front();
      } else if (ended_by_caller_ && !half_closed_) {
        writing_ = half_closed_ = true;
        stream_->WritesDone(write_.Begin());
      }
    }
    // What is owed, or why the stream has ended.
    if (!reading_ && (!owed_.empty() || half_closed_ || broken_)) {
      reading_ = true;
      stream_->Read(&reply_, read_.Begin());
    }
  }

  void Opened(bool ok) {
    absl::MutexLock lock(&mutex_);
    opened_ = true;
    broken_ = broken_ || !ok;
    Pump();
  }

  void Written(bool ok) {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    broken_ = broken_ || !ok;
    Pump();
  }

  void HasRead(bool ok) {
    Owed owed;
    {
      absl::MutexLock lock(&mutex_);
      // A reply that nobody has asked for is no reply of this protocol.
      if (ok && owed_.empty()) context_.TryCancel();
      if (!ok || owed_.empty()) {
        broken_ = finishing_ = true;
        stream_->Finish(&status_, finish_.Begin());
        return;
      }
      owed = std::move(owed_.front());
      owed_.pop_front();
    }
    // Until the callback has returned, nothing else is read: the next one comes after it.
    owed.done(StreamedResultOf(owed.expected, std::move(reply_), std::move(owed.spare)));
    absl::MutexLock lock(&mutex_);
    reading_ = false;
    Pump();
  }

  void Finished(bool) {
    std::deque<Owed> owed;
    absl::Status end = FromGrpcStatus(status_);
    if (end.ok()) end = absl::UnavailableError("infer stream: the service ended it");
    {
      absl::MutexLock lock(&mutex_);
      end_ = end;
      unsent_.clear();
      owed.swap(owed_);
    }
    for (Owed& one : owed) one.done(end);
  }

  const std::shared_ptr<CompletionThread> thread_;  // outlives what is on its queue
  const std::shared_ptr<grpc::Channel> channel_;
  const std::size_t max_under_way_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  grpc::ByteBuffer reply_;  // the reading operation's
  grpc::Status status_;     // the finishing one's
  absl::Mutex mutex_;
  Event opening_{this, &StreamCall::Opened};
  Event write_{this, &StreamCall::Written};
  Event read_{this, &StreamCall::HasRead};
  Event finish_{this, &StreamCall::Finished};
  std::deque<grpc::ByteBuffer> unsent_ ABSL_GUARDED_BY(mutex_);
  std::deque<Owed> owed_ ABSL_GUARDED_BY(mutex_);  // oldest first
  bool opened_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;  // or in the callback of what was read
  bool ended_by_caller_ ABSL_GUARDED_BY(mutex_) = false;
  bool half_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;     // takes no more requests
  bool finishing_ ABSL_GUARDED_BY(mutex_) = false;  // why it has ended is on its way, or there
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
};

class StreamHandle final : public AsyncInferStream {
 public:
  explicit StreamHandle(std::shared_ptr<StreamCall> call) : call_(std::move(call)) {}
  ~StreamHandle() override { call_->Cancel(); }
  absl::Status Send(const InferRequest& request, InferCallback done, TensorBytes spare) override {
    const std::shared_ptr<StreamCall> call = call_;  // The callback may drop the handle meanwhile.
    return call->Send(request, std::move(done), std::move(spare));
  }
  void End() override { call_->End(); }
  void Cancel() override { call_->Cancel(); }

 private:
  const std::shared_ptr<StreamCall> call_;
};

}  // namespace

std::unique_ptr<AsyncInferStream> OpenGrpcAsyncStream(std::shared_ptr<grpc::Channel> channel,
                                                      std::shared_ptr<CompletionThread> thread,
                                                      const StreamOptions& options) {
  auto call = std::make_shared<StreamCall>(std::move(channel), std::move(thread), options);
  call->Open();
  return std::make_unique<StreamHandle>(std::move(call));
}

}  // namespace epserve::client
