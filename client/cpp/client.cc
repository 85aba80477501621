#include "client/cpp/client.h"

#include <grpcpp/alarm.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/impl/codegen/client_unary_call.h>

#include <random>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/cpp/channel.h"
#include "client/cpp/client_core.h"
#include "client/cpp/infer_message.h"
#include "client/cpp/infer_stream.h"
#include "client/cpp/infer_wire.h"
#include "client/cpp/status.h"

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

// The wait before the next attempt, or nullopt if the status stands. A wait that the deadline would
// cut short is not begun: the caller learns the server's reason now.
std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, int attempt,
                                         const absl::Status& status,
                                         const grpc::ClientContext& context, absl::Time deadline) {
  const auto delay =
      NextAttemptDelay(policy, attempt, status.code(), Pushback(context), RandomFraction());
  if (!delay || absl::Now() + *delay >= deadline) return std::nullopt;
  return delay;
}

void Prepare(const InferRequest& request, absl::Time deadline, grpc::ClientContext& context) {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
  for (const auto& [key, value] : request.metadata) context.AddMetadata(key, value);
}

}  // namespace

InferenceClient::InferenceClient(const ClientOptions& options) : core_(std::make_shared<Core>()) {
  core_->retry = options.retry;
  core_->channel =
      CreateServiceChannel(options.target, options.security, options.max_reconnect_backoff);
  core_->stub = inference::GRPCInferenceService::NewStub(core_->channel);
}

InferenceClient::~InferenceClient() = default;

absl::StatusOr<InferResult> InferenceClient::Infer(const InferRequest& request, TensorBytes spare) {
  EPC_ASSIGN_OR_RETURN(const RequestParts parts, ToMessage(request));
  const grpc::ByteBuffer bytes = Serialize(parts);
  const grpc::internal::RpcMethod method(kInferMethod, grpc::internal::RpcMethod::NORMAL_RPC);
  const absl::Time deadline = absl::Now() + request.timeout;
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    Prepare(request, deadline, context);
    AwaitReconnect(*core_->channel, deadline);
    grpc::ByteBuffer reply;
    const absl::Status status =
        FromGrpcStatus(grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>(
            core_->channel.get(), method, &context, bytes, &reply));
    if (status.ok()) {
      ResponseParts response;
      EPC_RETURN_IF_ERROR(Parse(std::move(reply), std::move(spare), &response));
      EPC_ASSIGN_OR_RETURN(InferResult result, FromMessage(ExpectedOf(request), response.message,
                                                           std::move(response.raw)));
      result.attempts = attempt;
      return result;
    }
    const auto delay = RetryDelay(core_->retry, attempt, status, context, deadline);
    if (!delay) return status;
    absl::SleepFor(*delay);
  }
}

// One asynchronous call: attempts and the waits between them, one after another. It keeps itself
// alive through what it has handed to gRPC. The mutex guards what Cancel and the callbacks share;
// `done_` runs outside it.
class InferenceClient::AsyncCall : public PendingInfer,
                                   public std::enable_shared_from_this<AsyncCall> {
 public:
  AsyncCall(std::shared_ptr<Core> core, const InferRequest& request, const RequestParts& parts,
            InferCallback done)
      : core_(std::move(core)),
        stub_(core_->channel),
        message_(Serialize(parts)),
        done_(std::move(done)),
        deadline_(absl::Now() + request.timeout),
        expected_(ExpectedOf(request)) {
    request_.metadata = request.metadata;
  }

  void Start() {
    {
      absl::MutexLock lock(&mutex_);
      if (!cancelled_) {
        ++attempt_;
        context_ = std::make_unique<grpc::ClientContext>();
        Prepare(request_, deadline_, *context_);
        reply_.Clear();
        stub_.UnaryCall(context_.get(), kInferMethod, grpc::StubOptions(), &message_, &reply_,
                        [self = shared_from_this()](grpc::Status status) {
                          self->AttemptDone(FromGrpcStatus(status));
                        });
        return;
      }
    }
    Done(absl::CancelledError("infer: cancelled by the caller while waiting to retry"));
  }

  void Cancel() override {
    absl::MutexLock lock(&mutex_);
    if (cancelled_) return;
    cancelled_ = true;
    if (context_ != nullptr) context_->TryCancel();
    if (alarm_ != nullptr) alarm_->Cancel();
  }

 private:
  void AttemptDone(const absl::Status& status) {
    if (status.ok()) {
      ResponseParts response;
      const absl::Status parsed = Parse(std::move(reply_), TensorBytes(), &response);
      if (!parsed.ok()) return Done(parsed);
      auto result = FromMessage(expected_, response.message, std::move(response.raw));
      if (result.ok()) result->attempts = attempt_;
      Done(std::move(result));
      return;
    }
    {
      absl::MutexLock lock(&mutex_);
      const auto delay = RetryDelay(core_->retry, attempt_, status, *context_, deadline_);
      context_.reset();
      if (delay && !cancelled_) {
        Wait(*delay);
        return;
      }
    }
    Done(status);
  }

  void Wait(absl::Duration delay) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    alarm_ = std::make_unique<grpc::Alarm>();
    alarm_->Set(absl::ToChronoTime(absl::Now() + delay),
                [self = shared_from_this()](bool) { self->WaitDone(); });
  }

  void WaitDone() {
    {
      absl::MutexLock lock(&mutex_);
      alarm_.reset();
    }
    Start();
  }

  void Done(absl::StatusOr<InferResult> result) {
    InferCallback done = std::exchange(done_, nullptr);
    done(std::move(result));
  }

  const std::shared_ptr<Core> core_;
  grpc::GenericStub stub_;
  const grpc::ByteBuffer message_;
  InferCallback done_;
  const absl::Time deadline_;
  const ExpectedOutput expected_;
  InferRequest request_;  // What Prepare needs; the tensors are in the message.
  grpc::ByteBuffer reply_;

  absl::Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  int attempt_ = 0;  // Written by the one attempt at a time.
  std::unique_ptr<grpc::ClientContext> context_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<grpc::Alarm> alarm_ ABSL_GUARDED_BY(mutex_);
};

namespace {

// gRPC 1.51 runs callbacks on threads that are joined when the last channel with such calls goes.
// A call's last holder may be one of those threads, which must not join itself; so the first
// channel with such calls stays until the process ends, and the threads with it. "used" keeps the
// pointer in the program, by which a leak checker finds the channel still held.
void KeepCallbackThreads(const std::shared_ptr<grpc::Channel>& channel) {
  [[gnu::used]] static const auto* const kept = new std::shared_ptr<grpc::Channel>(channel);
}

}  // namespace

std::shared_ptr<PendingInfer> InferenceClient::InferAsync(const InferRequest& request,
                                                          InferCallback done) {
  auto message = ToMessage(request);
  if (!message.ok()) {
    // The promise is a callback from another thread in every case: an expired alarm gives one.
    // The alarm is dropped by its own callback, which owns the object that owns it.
    struct Refused : PendingInfer {
      void Cancel() override {}
      std::unique_ptr<grpc::Alarm> alarm = std::make_unique<grpc::Alarm>();
    };
    auto refused = std::make_shared<Refused>();
    refused->alarm->Set(absl::ToChronoTime(absl::Now()),
                        [refused, status = message.status(), done = std::move(done)](bool) {
                          refused->alarm.reset();
                          done(status);
                        });
    return refused;
  }
  auto call = std::make_shared<AsyncCall>(core_, request, *message, std::move(done));
  KeepCallbackThreads(core_->channel);
  call->Start();
  return call;
}

std::unique_ptr<InferStream> InferenceClient::OpenStream(const StreamOptions& options) {
  return OpenInferStream(core_->channel, options);
}

absl::StatusOr<bool> InferenceClient::IsReady(absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::ServerReadyResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->ServerReady(&context, {}, &response)));
  return response.ready();
}

absl::StatusOr<bool> InferenceClient::IsLive(absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::ServerLiveResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->ServerLive(&context, {}, &response)));
  return response.live();
}

absl::Status InferenceClient::WaitUntilReady(absl::Duration timeout) {
  constexpr absl::Duration kPollInterval = absl::Milliseconds(50);
  const absl::Time deadline = absl::Now() + timeout;
  std::string reason = "it has not answered";
  while (true) {
    const absl::Duration left = deadline - absl::Now();
    const auto ready = IsReady(std::min(left, absl::Seconds(1)));
    if (ready.ok() && *ready) return absl::OkStatus();
    reason = ready.ok() ? "it answers, but not every worker is serving"
                        : std::string(ready.status().message());
    if (absl::Now() + kPollInterval >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("wait until ready: the service is not ready after ",
                       absl::FormatDuration(timeout), ": ", reason));
    }
    absl::SleepFor(kPollInterval);
  }
}

absl::StatusOr<std::string> InferenceClient::OnlyModel(absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::RepositoryIndexResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->RepositoryIndex(&context, {}, &response)));
  if (response.models_size() != 1) {
    return absl::FailedPreconditionError(absl::StrCat("find model: the service holds ",
                                                      response.models_size(),
                                                      " models; name the one that is meant"));
  }
  return response.models(0).name();
}

absl::StatusOr<ModelDescription> InferenceClient::DescribeModel(const std::string& model,
                                                                absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::ModelMetadataRequest request;
  request.set_name(model);
  inference::ModelMetadataResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->ModelMetadata(&context, request, &response)));
  ModelDescription description;
  description.name = response.name();
  description.platform = response.platform();
  description.versions.assign(response.versions().begin(), response.versions().end());
  for (const auto& input : response.inputs()) {
    if (input.shape_size() != 2) continue;
    if (input.name() == kHiddenStates) description.hidden = input.shape(1);
    if (input.name() == "topk_ids") description.topk = input.shape(1);
  }
  if (description.hidden <= 0 || description.topk <= 0) {
    return absl::InternalError(absl::StrCat("describe model: '", model, "' is described with H ",
                                            description.hidden, " and K ", description.topk));
  }
  return description;
}

}  // namespace epserve::client
