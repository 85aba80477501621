#include "server/coordinator/front_door/infer_call.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/common/grpc_status.h"
#include "server/coordinator/front_door/infer_proto_convert.h"
#include "server/coordinator/front_door/request_validation.h"

namespace epserve::coordinator {
namespace {

using Clock = PendingRequest::Clock;

constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";

// The caller's deadline on the monotonic clock; max(): none.
Clock::time_point DeadlineOf(const grpc::CallbackServerContext& context, Clock::time_point now) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return Clock::time_point::max();
  const auto left = deadline - std::chrono::system_clock::now();
  // A deadline so far off that it does not fit the other clock is none.
  if (left > std::chrono::hours(24 * 365)) return Clock::time_point::max();
  return now + std::chrono::duration_cast<Clock::duration>(left);
}

Clock::time_point EarlierOf(Clock::time_point deadline, Clock::time_point now,
                            std::int64_t timeout_us) {
  constexpr std::int64_t kYearUs = std::int64_t{365} * 24 * 3600 * 1'000'000;
  if (timeout_us == 0 || timeout_us > kYearUs) return deadline;
  return std::min(deadline, now + std::chrono::microseconds(timeout_us));
}

absl::Status TooLate() {
  return absl::DeadlineExceededError("infer: the deadline had passed when the request arrived");
}

// Held by gRPC's side (through Reactor) until the call has finished, and by the sink's
// PendingInfer.
class InferCall final : public std::enable_shared_from_this<InferCall> {
 public:
  InferCall(grpc::CallbackServerContext* context, grpc::ByteBuffer* response,
            grpc::ServerUnaryReactor* reactor, InferContext& shared)
      : context_(context),
        response_(response),
        reactor_(reactor),
        shared_(shared),
        arrival_(Clock::now()) {}

  void Start(const grpc::ByteBuffer* bytes);

  // Answers unless the call has been answered. `request` and `output` are used with an OK status.
  void Answer(const Completion& completion, const ValidatedRequest* request, std::string output);

  // The caller has gone.
  void Cancel();

 private:
  absl::Status Submit(const grpc::ByteBuffer* bytes);
  absl::Status WriteReply(const InferTimes& times, const ValidatedRequest& request,
                          std::string output);
  void FinishWith(const absl::Status& status, std::int64_t retry_pushback_ms);

  // Valid until the reactor's Finish() only, hence for whoever has won `answered_`.
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_;
  grpc::ServerUnaryReactor* const reactor_;
  InferContext& shared_;
  const Clock::time_point arrival_;

  // Written in Start(), before any other thread knows of the call.
  InferRequestMessage message_;
  std::uint64_t id_ = 0;
  Clock::time_point deadline_ = Clock::time_point::max();

  std::atomic<bool> answered_{false};
};

// gRPC starts no callback before a reactor is built, but orders the two by atomics of a library
// that ThreadSanitizer does not see into; these tell it. Elsewhere they are nothing.
#if defined(__SANITIZE_THREAD__)
void TellBuilt(void* reactor) { __tsan_release(reactor); }
void SeeBuilt(void* reactor) { __tsan_acquire(reactor); }
#else
void TellBuilt(void*) {}
void SeeBuilt(void*) {}
#endif

// gRPC's end of a call; lives from the call's start until OnDone().
class Reactor final : public grpc::ServerUnaryReactor {
 public:
  Reactor(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
          grpc::ByteBuffer* response, InferContext& shared)
      : call_(std::make_shared<InferCall>(context, response, this, shared)) {
    TellBuilt(this);
    call_->Start(request);
  }

 private:
  void OnCancel() override {
    SeeBuilt(this);
    // A share of its own: once Cancel() has answered, the call may end on another thread.
    const std::shared_ptr<InferCall> call = call_;
    call->Cancel();
  }
  void OnDone() override { delete this; }

  const std::shared_ptr<InferCall> call_;
};

class PendingInfer final : public PendingRequest {
 public:
  PendingInfer(std::uint64_t request_id, Clock::time_point arrived_at, Clock::time_point ends_at,
               ValidatedRequest validated, std::shared_ptr<InferCall> call)
      : PendingRequest(request_id, arrived_at, ends_at, std::move(validated)),
        call_(std::move(call)) {}

  ~PendingInfer() override {
    if (completed_) return;
    call_->Answer({absl::InternalError("infer: the request was dropped without an answer"), {}},
                  nullptr, std::string());
  }

  std::span<char> MutableOutput() override {
    if (output_.size() != request.output_bytes) output_.resize(request.output_bytes);
    return {output_.data(), output_.size()};
  }

  void Complete(Completion completion) override {
    if (std::exchange(completed_, true)) return;
    call_->Answer(completion, &request, std::move(output_));
  }

 private:
  const std::shared_ptr<InferCall> call_;
  std::string output_;  // becomes the reply's raw entry without another copy
  bool completed_ = false;
};

void InferCall::Start(const grpc::ByteBuffer* bytes) {
  const absl::Status status = Submit(bytes);
  if (!status.ok()) Answer({status, {}}, nullptr, std::string());
}

absl::Status InferCall::Submit(const grpc::ByteBuffer* bytes) {
  deadline_ = DeadlineOf(*context_, arrival_);
  if (deadline_ <= Clock::now()) return TooLate();
  // A call that ended on its way comes without its message.
  if (!bytes->Valid() || context_->IsCancelled()) {
    return absl::CancelledError("infer: the caller cancelled the request before it had arrived");
  }
  EPS_ASSIGN_OR_RETURN(message_, ParseInferRequest(*bytes, shared_.options.limits));
  // The parsed message holds all that is needed; the wire's bytes would double the memory.
  context_->GetRpcAllocatorState()->FreeRequest();
  EPS_ASSIGN_OR_RETURN(ValidatedRequest request,
                       ValidateRequest(message_.view, shared_.options.model, shared_.options.limits,
                                       shared_.regions));
  deadline_ = EarlierOf(deadline_, arrival_, request.timeout_us);
  if (deadline_ <= Clock::now()) return TooLate();
  id_ = shared_.next_id.fetch_add(1, std::memory_order_relaxed);
  shared_.sink.Submit(std::make_unique<PendingInfer>(id_, arrival_, deadline_, std::move(request),
                                                     shared_from_this()));
  return absl::OkStatus();
}

void InferCall::Answer(const Completion& completion, const ValidatedRequest* request,
                       std::string output) {
  // acq_rel: what Start() wrote is seen by whichever thread wins.
  if (answered_.exchange(true, std::memory_order_acq_rel)) return;
  absl::Status status = completion.status;
  if (status.ok()) status = WriteReply(completion.times, *request, std::move(output));
  FinishWith(status, completion.retry_pushback_ms);
}

absl::Status InferCall::WriteReply(const InferTimes& times, const ValidatedRequest& request,
                                   std::string output) {
  if (output.size() != request.output_bytes) {
    return absl::InternalError(absl::StrCat("infer: the batch gave ", output.size(),
                                            " output bytes, not ", request.output_bytes));
  }
  if (request.output.region != nullptr) {
    EPS_RETURN_IF_ERROR(request.output.region->Write(request.output.offset_bytes, output));
    output.clear();
  }
  InferReply reply;
  reply.id = message_.id;
  reply.request = &request;
  reply.times = times;
  reply.server_us =
      std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - arrival_).count();
  reply.output = std::move(output);
  return SerializeInferReply(shared_.options.model, std::move(reply), response_);
}

void InferCall::FinishWith(const absl::Status& status, std::int64_t retry_pushback_ms) {
  if (status.code() == absl::StatusCode::kResourceExhausted) {
    const std::int64_t pushback_ms =
        retry_pushback_ms > 0 ? retry_pushback_ms : shared_.options.retry_pushback_ms;
    context_->AddTrailingMetadata(kPushbackKey, absl::StrCat(pushback_ms));
  }
  shared_.sink.OnAnswered(status.code(), Clock::now() - arrival_);
  reactor_->Finish(server::ToGrpcStatus(status));
}

void InferCall::Cancel() {
  if (answered_.exchange(true, std::memory_order_acq_rel)) return;
  shared_.sink.Cancel(id_);
  FinishWith(Clock::now() >= deadline_
                 ? absl::DeadlineExceededError("infer: the deadline passed before the answer")
                 : absl::CancelledError("infer: the caller cancelled the request"),
             0);
}

}  // namespace

grpc::ServerUnaryReactor* StartInferCall(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response, InferContext& shared) {
  return new Reactor(context, request, response, shared);
}

}  // namespace epserve::coordinator
