#include "client/cpp/async_call.h"

#include <random>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "client/cpp/channel.h"
#include "client/cpp/infer_wire.h"

namespace epserve::client {

namespace {

std::optional<std::string> Pushback(const grpc::ClientContext& context) {
  const auto& trailing = context.GetServerTrailingMetadata();
  const auto found = trailing.find(kPushbackKey);
  if (found == trailing.end()) return std::nullopt;
  return std::string(found->second.data(), found->second.size());
}

double RandomFraction() {
  thread_local std::minstd_rand engine(std::random_device{}());
  return std::uniform_real_distribution<double>(0.0, 1.0)(engine);
}

}  // namespace

void PrepareAttempt(const InferRequest& request, absl::Time deadline,
                    grpc::ClientContext& context) {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
  for (const auto& [key, value] : request.metadata) context.AddMetadata(key, value);
}

absl::Status OutcomeOf(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  return WithPushback(FromGrpcStatus(status), Pushback(context));
}

std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, int attempt,
                                         const absl::Status& status,
                                         const grpc::ClientContext& context, absl::Time deadline) {
  const auto delay =
      NextAttemptDelay(policy, attempt, status.code(), Pushback(context), RandomFraction());
  if (!delay || absl::Now() + *delay >= deadline) return std::nullopt;
  return delay;
}

AsyncCall::AsyncCall(std::shared_ptr<grpc::Channel> channel,
                     std::shared_ptr<CompletionThread> thread, const RetryPolicy& retry,
                     const InferRequest& request, InferCallback done, TensorBytes spare)
    : thread_(std::move(thread)),
      channel_(std::move(channel)),
      stub_(channel_),
      retry_(retry),
      deadline_(absl::Now() + request.timeout),
      expected_(ExpectedOf(request)),
      done_(std::move(done)),
      spare_(SpareOf(std::move(spare))) {
  request_.metadata = request.metadata;
  const auto parts = ToMessage(request);
  refusal_ = parts.status();
  if (parts.ok()) message_ = Serialize(*parts);
}

void AsyncCall::Start(const std::shared_ptr<AsyncCall>& self) {
  absl::MutexLock lock(&self->mutex_);
  self->self_ = self;
  if (self->refusal_.ok()) {
    self->Attempt();
  } else {
    self->Wait(absl::ZeroDuration());  // The promise is a callback from the thread in every case.
  }
}

void AsyncCall::Cancel() {
  absl::MutexLock lock(&mutex_);
  if (cancelled_) return;
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
  if (alarm_ != nullptr) alarm_->Cancel();
}

void AsyncCall::Attempt() {
  ++attempt_;
  context_ = std::make_unique<grpc::ClientContext>();
  PrepareAttempt(request_, deadline_, *context_);
  reply_.Clear();
  rpc_ = stub_.PrepareUnaryCall(context_.get(), kInferMethod, message_, thread_->queue());
  rpc_->StartCall();
  rpc_->Finish(&reply_, &status_, static_cast<Operation*>(this));
}

void AsyncCall::Wait(absl::Duration delay) {
  alarm_ = std::make_unique<grpc::Alarm>();
  alarm_->Set(thread_->queue(), absl::ToChronoTime(absl::Now() + delay),
              static_cast<Operation*>(this));
}

void AsyncCall::Done(bool) {
  std::shared_ptr<AsyncCall> self;
  std::optional<absl::Status> status;
  int attempts = 0;
  {
    absl::MutexLock lock(&mutex_);
    status = Proceed();
    if (!status) return;
    self = std::move(self_);
    attempts = attempt_;
    context_.reset();  // Under the lock: Cancel() may be looking at it.
  }
  const InferCallback done = std::exchange(done_, nullptr);
  // Nothing of gRPC's reads the request any more; its tensors' memory may be written by `done`.
  message_.Clear();
  if (!status->ok()) return done(*status);
  auto result = ResultOf(expected_, std::move(reply_), std::move(spare_));
  if (result.ok()) result->attempts = attempts;
  done(std::move(result));
}

std::optional<absl::Status> AsyncCall::Proceed() {
  if (alarm_ != nullptr) {
    alarm_.reset();
    if (!refusal_.ok()) return refusal_;
    if (cancelled_) {
      return absl::CancelledError("infer: cancelled by the caller while waiting to retry");
    }
    Attempt();
    return std::nullopt;
  }
  rpc_.reset();
  const absl::Status status = OutcomeOf(status_, *context_);
  if (status.ok()) return status;
  const auto delay = RetryDelay(retry_, attempt_, status, *context_, deadline_);
  context_.reset();
  if (!delay || cancelled_) return status;
  Wait(*delay);
  return std::nullopt;
}

}  // namespace epserve::client
