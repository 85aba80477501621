#include "client/cpp/client.h"

#include <grpcpp/impl/codegen/client_unary_call.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/async_call.h"
#include "client/cpp/async_infer_stream.h"
#include "client/cpp/channel.h"
#include "client/cpp/client_core.h"
#include "client/cpp/infer_message.h"
#include "client/cpp/infer_stream.h"
#include "client/cpp/infer_wire.h"
#include "client/cpp/status.h"

namespace epserve::client {

InferenceClient::InferenceClient(const ClientOptions& options) : core_(std::make_shared<Core>()) {
  core_->retry = options.retry;
  core_->busy_poll =
      std::clamp(options.busy_poll, absl::ZeroDuration(), ClientOptions::kMaxBusyPoll);
  core_->threads.resize(static_cast<std::size_t>(std::max(options.async_threads, 1)));
  core_->channel =
      CreateServiceChannel(options.target, options.security, options.max_reconnect_backoff);
  core_->stub = inference::GRPCInferenceService::NewStub(core_->channel);
}

InferenceClient::~InferenceClient() = default;

absl::StatusOr<InferResult> InferenceClient::Infer(const InferRequest& request, TensorBytes spare) {
  EPC_ASSIGN_OR_RETURN(const RequestParts parts, ToMessage(request));
  const grpc::ByteBuffer bytes = Serialize(parts);
  spare = SpareOf(std::move(spare));
  const grpc::internal::RpcMethod method(kInferMethod, grpc::internal::RpcMethod::NORMAL_RPC);
  const absl::Time deadline = absl::Now() + request.timeout;
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    PrepareAttempt(request, deadline, context);
    AwaitReconnect(*core_->channel, deadline);
    grpc::ByteBuffer reply;
    const absl::Status status =
        OutcomeOf(grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>(
                      core_->channel.get(), method, &context, bytes, &reply),
                  context);
    if (status.ok()) {
      EPC_ASSIGN_OR_RETURN(InferResult result,
                           ResultOf(ExpectedOf(request), std::move(reply), std::move(spare)));
      result.attempts = attempt;
      return result;
    }
    const auto delay = RetryDelay(core_->retry, attempt, status, context, deadline);
    if (!delay) return status;
    absl::SleepFor(*delay);
  }
}

std::shared_ptr<PendingInfer> InferenceClient::InferAsync(const InferRequest& request,
                                                          InferCallback done, TensorBytes spare) {
  const auto call = std::make_shared<AsyncCall>(core_->channel, core_->NextThread(), core_->retry,
                                                request, std::move(done), std::move(spare));
  AsyncCall::Start(call);
  return call;
}

std::unique_ptr<InferStream> InferenceClient::OpenStream(const StreamOptions& options) {
  return OpenInferStream(core_->channel, options);
}

std::unique_ptr<AsyncInferStream> InferenceClient::OpenAsyncStream(const StreamOptions& options) {
  return OpenGrpcAsyncStream(core_->channel, core_->NextThread(), options);
}

absl::StatusOr<bool> InferenceClient::IsReady(absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::ServerReadyResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->ServerReady(&context, {}, &response)));
  return response.ready();
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
