#include "server/coordinator/control_service.h"

#include <grpcpp/alarm.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "epserve/v1/control.pb.h"
#include "server/common/grpc_status.h"
#include "server/coordinator/control_proto_convert.h"
#include "server/rpc/messages.h"

namespace epserve::coordinator {
namespace {

// Messages that may wait for a worker that does not read: far more than the batches in flight and
// the leases of one lease time ever put there.
constexpr std::size_t kMaxWaitingMessages = 1024;

// The stream of one worker. the call's queue calls the On... methods, the host the WorkerStream
// methods, each from any thread, and the host may do so from within what an On... method reports.
// Lives until both have let go: the call at OnDone, the host at StreamClosed.
//
// gRPC allows one read and one write at a time, and one Finish. Finish waits for the write in
// flight; where the peer does not read, TryCancel makes that write fail.
class ControlStream final : public server::CallHandler, public WorkerStream {
 public:
  ControlStream(server::ServerCall* call, Host* host, const HelloPolicy* policy, Refusals* refusals)
      : call_(call), host_(host), policy_(policy), refusals_(refusals), id_(host->NewStreamId()) {}

  // Takes the reference that gRPC holds until OnDone, and begins to read.
  void Begin(std::shared_ptr<ControlStream> self) {
    hello_alarm_.Set(
        std::chrono::system_clock::now() + std::chrono::milliseconds(policy_->hello_timeout_ms),
        [weak = std::weak_ptr<ControlStream>(self)](bool expired) {
          const std::shared_ptr<ControlStream> stream = weak.lock();
          if (expired && stream != nullptr) stream->HelloIsLate();
        });
    self_ = std::move(self);
    call_->StartRead(&received_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      EndReading();
      return;
    }
    // This flag is written by this callback alone; others read it under the lock. Who has not
    // joined may be anybody.
    const bool fits = joined_ || received_.Length() <= server::kSmallMessageBytes;
    absl::Status status = fits ? server::ParseMessage(received_, &incoming_)
                               : server::MessageTooLarge("control: Hello", received_.Length(),
                                                         server::kSmallMessageBytes);
    received_.Clear();
    if (status.ok()) status = joined_ ? Take() : Join();
    if (!status.ok()) {
      Close(std::move(status), /*flush=*/true);
      return;
    }
    // A worker that owes nothing sends heartbeats at most.
    if (owed_answers_.load(std::memory_order_relaxed) > 0) {
      call_->StartRead(&received_);
    } else {
      call_->StartReadAfterWrite(&received_);
    }
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mu_);
    writing_ = false;
    if (!ok) broken_ = true;
    Continue(lock);
  }

  void OnCancel() override { EndReading(); }

  void OnDone() override {
    EndReading();
    std::shared_ptr<ControlStream> last = std::move(self_);
  }

  void Send(StreamMessage message) override {
    if (std::holds_alternative<ShardMessage>(message)) owed_answers_.fetch_add(1);
    if (std::holds_alternative<SendEpochEnded>(message)) owed_answers_.store(0);
    grpc::ByteBuffer converted;
    absl::Status status = server::SerializeMessage(ToProto(std::move(message)), &converted);
    if (!status.ok()) return Close(std::move(status), /*flush=*/false);
    bool overrun = false;
    {
      std::unique_lock<std::mutex> lock(mu_);
      if (ending_.has_value() || broken_ || finished_) return;
      overrun = waiting_.size() >= kMaxWaitingMessages;
      if (!overrun) {
        waiting_.emplace_back().Swap(&converted);  // Moving one would copy it.
        Continue(lock);
      }
    }
    if (overrun) {
      Close(
          absl::ResourceExhaustedError(absl::StrCat(
              "control: ", kMaxWaitingMessages, " messages wait for a worker that does not read")),
          /*flush=*/false);
    }
  }

  void Close(absl::Status reason, bool flush) override {
    bool cancel = false;
    {
      std::unique_lock<std::mutex> lock(mu_);
      if (ending_.has_value() || finished_) return;
      ending_ = std::move(reason);
      if (!flush) {
        waiting_.clear();
        cancel = writing_;
      }
      cancelling_ = cancel;
      Continue(lock);
    }
    if (!cancel) return;
    call_->TryCancel();
    std::unique_lock<std::mutex> lock(mu_);
    cancelling_ = false;
    Continue(lock);
  }

 private:
  void HelloIsLate() {
    {
      std::lock_guard<std::mutex> lock(mu_);
      if (joined_) return;
    }
    Close(absl::DeadlineExceededError(
              absl::StrCat("control: no Hello within ", policy_->hello_timeout_ms, " ms")),
          /*flush=*/false);
  }

  absl::Status Join() {
    hello_alarm_.Cancel();
    if (!incoming_.has_hello()) {
      return absl::FailedPreconditionError("control: the first message is no Hello");
    }
    HelloInfo hello = FromProto(incoming_.hello());
    hello.peer = call_->context().peer();
    absl::Status checked = CheckHello(hello, *policy_);
    if (!checked.ok()) {
      refusals_->OnWorker(Refusals::Worker::kRejected, hello, checked);
      Send(RejectWorker{id_, checked.code(), std::string(checked.message())});
      return checked;
    }
    host_->OpenStream(id_, self_, std::move(hello));
    // After that, so that nobody reports the stream closed before it is open.
    std::lock_guard<std::mutex> lock(mu_);
    joined_ = true;
    return absl::OkStatus();
  }

  absl::Status Take() {
    absl::StatusOr<WorkerReport> report = FromProto(id_, incoming_);
    if (!report.ok()) return report.status();
    if (std::holds_alternative<BatchDone>(report->event) && owed_answers_.load() > 0) {
      owed_answers_.fetch_sub(1);
    }
    host_->Report(*std::move(report));
    return absl::OkStatus();
  }

  // Nothing more comes from this worker.
  void EndReading() {
    std::unique_lock<std::mutex> lock(mu_);
    const bool tell = joined_ && !std::exchange(told_closed_, true);
    broken_ = true;
    Continue(lock);
    if (lock.owns_lock()) lock.unlock();
    if (tell) host_->Report({StreamClosed{id_}});
  }

  // Starts the next write, or Finish where it is due, after the lock: the call's queue may report
  // its end to another thread before this one goes on.
  void Continue(std::unique_lock<std::mutex>& lock) {
    if (writing_ || cancelling_ || finished_) return;
    if (!broken_ && !waiting_.empty()) {
      outgoing_.Swap(&waiting_.front());
      waiting_.pop_front();
      writing_ = true;
      lock.unlock();
      call_->StartWrite(outgoing_);
    } else if (broken_ || ending_.has_value()) {
      finished_ = true;
      const absl::Status status = ending_.value_or(absl::OkStatus());
      lock.unlock();
      call_->Finish(server::ToGrpcStatus(status));
    }
  }

  server::ServerCall* const call_;
  Host* const host_;
  const HelloPolicy* const policy_;
  Refusals* const refusals_;
  const StreamId id_;

  // Of the read in flight; the queue orders its callbacks.
  grpc::ByteBuffer received_;
  v1::WorkerMessage incoming_;

  // Shards without a BatchDone, about: it only decides how soon is read.
  std::atomic<int> owed_answers_{0};

  grpc::Alarm hello_alarm_;  // set before the first callback, until the first message

  std::mutex mu_;
  std::shared_ptr<ControlStream> self_;   // set before the first callback, cleared at OnDone
  std::deque<grpc::ByteBuffer> waiting_;  // guarded by mu_
  grpc::ByteBuffer outgoing_;             // of the write in flight
  std::optional<absl::Status> ending_;    // guarded by mu_
  bool joined_ = false;                   // guarded by mu_
  bool writing_ = false;                  // guarded by mu_
  bool cancelling_ = false;   // guarded by mu_; holds back Finish, after which call_ may go
  bool broken_ = false;       // guarded by mu_; nothing more can be read or written
  bool finished_ = false;     // guarded by mu_
  bool told_closed_ = false;  // guarded by mu_
};

}  // namespace

void AddControlService(Host* host, HelloPolicy policy, Refusals* refusals,
                       server::RpcServer* server) {
  server->Handle(
      "/epserve.v1.Control/Connect",
      [host, refusals, shared = std::make_shared<const HelloPolicy>(std::move(policy))](
          server::ServerCall* call) -> server::CallHandler* {
        auto stream = std::make_shared<ControlStream>(call, host, shared.get(), refusals);
        ControlStream* const begun = stream.get();
        begun->Begin(std::move(stream));
        return begun;
      },
      // However many callers there are, a worker that comes back finds its place.
      server::RpcServer::Places::kFree, server::kAnyMessageBytes);
}

}  // namespace epserve::coordinator
