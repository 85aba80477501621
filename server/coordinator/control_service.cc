#include "server/coordinator/control_service.h"

#include <grpcpp/alarm.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "epserve/v1/control.grpc.pb.h"
#include "runtime/base/log.h"
#include "server/common/grpc_status.h"
#include "server/coordinator/control_proto_convert.h"

namespace epserve::coordinator {
namespace {

// Messages that may wait for a worker that does not read: far more than the batches in flight and
// the leases of one lease time ever put there.
constexpr std::size_t kMaxWaitingMessages = 1024;

using Reactor = grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>;

// The stream of one worker. gRPC calls the On... methods, the host the WorkerStream methods, each
// from any thread, and the host may do so from within what an On... method reports. Lives until
// both have let go: gRPC at OnDone, the host at StreamClosed.
//
// gRPC allows one read and one write at a time, and one Finish. Finish waits for the write in
// flight; where the peer does not read, TryCancel makes that write fail.
class ControlStream final : public Reactor, public WorkerStream {
 public:
  ControlStream(grpc::CallbackServerContext* context, Host* host, const HelloPolicy* policy)
      : context_(context), host_(host), policy_(policy), id_(host->NewStreamId()) {}

  // Takes the reference that gRPC holds until OnDone, and begins to read.
  void Begin(std::shared_ptr<ControlStream> self) {
    hello_alarm_.Set(
        std::chrono::system_clock::now() + std::chrono::milliseconds(policy_->hello_timeout_ms),
        [weak = std::weak_ptr<ControlStream>(self)](bool expired) {
          const std::shared_ptr<ControlStream> stream = weak.lock();
          if (expired && stream != nullptr) stream->HelloIsLate();
        });
    self_ = std::move(self);
    StartRead(&incoming_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      EndReading();
      return;
    }
    // This flag is written by this callback alone; others read it under the lock.
    absl::Status status = joined_ ? Take() : Join();
    if (!status.ok()) {
      Close(std::move(status), /*flush=*/true);
      return;
    }
    StartRead(&incoming_);
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
    v1::CoordinatorMessage converted = ToProto(std::move(message));
    bool overrun = false;
    {
      std::unique_lock<std::mutex> lock(mu_);
      if (ending_.has_value() || broken_ || finished_) return;
      overrun = waiting_.size() >= kMaxWaitingMessages;
      if (!overrun) {
        waiting_.push_back(std::move(converted));
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
    context_->TryCancel();
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
    absl::Status checked = CheckHello(hello, *policy_);
    if (!checked.ok()) {
      runtime::LogWarning("worker_rejected",
                          {{"worker", hello.worker_id}, {"node", hello.node}, {"status", checked}});
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

  // Starts the next write, or Finish where it is due. Unlocks around either, because both may call
  // back at once.
  void Continue(std::unique_lock<std::mutex>& lock) {
    if (writing_ || cancelling_ || finished_) return;
    if (!broken_ && !waiting_.empty()) {
      outgoing_ = std::move(waiting_.front());
      waiting_.pop_front();
      writing_ = true;
      lock.unlock();
      StartWrite(&outgoing_);
    } else if (broken_ || ending_.has_value()) {
      finished_ = true;
      const absl::Status status = ending_.value_or(absl::OkStatus());
      lock.unlock();
      Finish(server::ToGrpcStatus(status));
    }
  }

  grpc::CallbackServerContext* const context_;
  Host* const host_;
  const HelloPolicy* const policy_;
  const StreamId id_;

  // Of the read in flight; gRPC orders its callbacks.
  v1::WorkerMessage incoming_;

  grpc::Alarm hello_alarm_;  // set before the first callback, until the first message

  std::mutex mu_;
  std::shared_ptr<ControlStream> self_;         // set before the first callback, cleared at OnDone
  std::deque<v1::CoordinatorMessage> waiting_;  // guarded by mu_
  v1::CoordinatorMessage outgoing_;             // of the write in flight
  std::optional<absl::Status> ending_;          // guarded by mu_
  bool joined_ = false;                         // guarded by mu_
  bool writing_ = false;                        // guarded by mu_
  bool cancelling_ = false;   // guarded by mu_; holds back Finish, after which context_ may go
  bool broken_ = false;       // guarded by mu_; nothing more can be read or written
  bool finished_ = false;     // guarded by mu_
  bool told_closed_ = false;  // guarded by mu_
};

class ControlService final : public v1::Control::CallbackService {
 public:
  ControlService(Host* host, HelloPolicy policy) : host_(host), policy_(std::move(policy)) {}

  Reactor* Connect(grpc::CallbackServerContext* context) override {
    auto stream = std::make_shared<ControlStream>(context, host_, &policy_);
    Reactor* reactor = stream.get();
    ControlStream* begun = stream.get();
    begun->Begin(std::move(stream));
    return reactor;
  }

 private:
  Host* const host_;
  const HelloPolicy policy_;
};

}  // namespace

std::unique_ptr<grpc::Service> CreateControlService(Host* host, HelloPolicy policy) {
  return std::make_unique<ControlService>(host, std::move(policy));
}

}  // namespace epserve::coordinator
