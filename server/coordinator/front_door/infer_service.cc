#include "server/coordinator/front_door/infer_service.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "inference/grpc_service.grpc.pb.h"
#include "runtime/base/status.h"
#include "server/common/grpc_status.h"
#include "server/coordinator/front_door/metadata_proto_convert.h"
#include "server/coordinator/front_door/request_validation.h"

namespace epserve::coordinator {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;
using Front = inference::GRPCInferenceService;

// Every unary method raw: see the header.
using RawCore = Front::WithRawCallbackMethod_ServerLive<Front::WithRawCallbackMethod_ServerReady<
    Front::WithRawCallbackMethod_ModelReady<Front::WithRawCallbackMethod_ServerMetadata<
        Front::WithRawCallbackMethod_ModelMetadata<Front::WithRawCallbackMethod_ModelInfer<
            Front::WithRawCallbackMethod_ModelConfig<Front::WithRawCallbackMethod_ModelStatistics<
                Front::WithRawCallbackMethod_RepositoryIndex<
                    Front::WithCallbackMethod_ModelStreamInfer<Front::Service>>>>>>>>>>;
using RawSystemShm = Front::WithRawCallbackMethod_SystemSharedMemoryStatus<
    Front::WithRawCallbackMethod_SystemSharedMemoryRegister<
        Front::WithRawCallbackMethod_SystemSharedMemoryUnregister<RawCore>>>;
using RawFront = Front::WithRawCallbackMethod_CudaSharedMemoryStatus<
    Front::WithRawCallbackMethod_CudaSharedMemoryRegister<
        Front::WithRawCallbackMethod_CudaSharedMemoryUnregister<RawSystemShm>>>;

template <typename Message>
absl::Status Parse(const ByteBuffer& bytes, Message* message) {
  ByteBuffer shared(bytes);
  if (grpc::SerializationTraits<Message>::Deserialize(&shared, message).ok()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("the message is not a ", Message::descriptor()->name()));
}

template <typename Message>
absl::Status Serialize(const Message& message, ByteBuffer* bytes) {
  bool own_buffer = false;
  return server::FromGrpcStatus(
      grpc::SerializationTraits<Message>::Serialize(message, bytes, &own_buffer));
}

// Parses, lets `fill(request, response)` do the work, and answers.
template <typename Request, typename Response, typename Fill>
ServerUnaryReactor* Reply(CallbackServerContext* context, const ByteBuffer* request_bytes,
                          ByteBuffer* response_bytes, const Fill& fill) {
  const auto work = [&]() -> absl::Status {
    Request request;
    EPS_RETURN_IF_ERROR(Parse(*request_bytes, &request));
    Response response;
    EPS_RETURN_IF_ERROR(fill(request, &response));
    return Serialize(response, response_bytes);
  };
  ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(server::ToGrpcStatus(work()));
  return reactor;
}

ServerUnaryReactor* Refuse(CallbackServerContext* context, const std::string& message) {
  ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(server::ToGrpcStatus(absl::UnimplementedError(message)));
  return reactor;
}

constexpr char kNoCudaShm[] =
    "cuda shared memory: this server has no backend for it; use system shared memory or send "
    "tensors inline";

// Ends a stream before its first message.
class RefusedStream final : public grpc::ServerBidiReactor<inference::ModelInferRequest,
                                                           inference::ModelStreamInferResponse> {
 public:
  RefusedStream() {
    Finish(server::ToGrpcStatus(absl::UnimplementedError(
        "stream infer: this server answers ModelInfer only; use unary requests")));
  }
  void OnDone() override { delete this; }
};

class InferService final : public RawFront {
 public:
  InferService(FrontDoorOptions options, ShmRegistry* regions, RequestSink* sink)
      : options_(std::move(options)),
        regions_(*regions),
        sink_(*sink),
        infer_context_{options_, *regions, *sink} {}

  ServerUnaryReactor* ServerLive(CallbackServerContext* context, const ByteBuffer* request,
                                 ByteBuffer* response) override {
    return Reply<inference::ServerLiveRequest, inference::ServerLiveResponse>(
        context, request, response, [](const auto&, auto* reply) {
          reply->set_live(true);
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ServerReady(CallbackServerContext* context, const ByteBuffer* request,
                                  ByteBuffer* response) override {
    return Reply<inference::ServerReadyRequest, inference::ServerReadyResponse>(
        context, request, response, [this](const auto&, auto* reply) {
          reply->set_ready(sink_.ready());
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ModelReady(CallbackServerContext* context, const ByteBuffer* request,
                                 ByteBuffer* response) override {
    return Reply<inference::ModelReadyRequest, inference::ModelReadyResponse>(
        context, request, response, [this](const auto& model, auto* reply) {
          EPS_RETURN_IF_ERROR(CheckServed("model ready", model));
          reply->set_ready(sink_.ready());
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ServerMetadata(CallbackServerContext* context, const ByteBuffer* request,
                                     ByteBuffer* response) override {
    return Reply<inference::ServerMetadataRequest, inference::ServerMetadataResponse>(
        context, request, response, [this](const auto&, auto* reply) {
          FillServerMetadata(regions_.allowed(), reply);
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ModelMetadata(CallbackServerContext* context, const ByteBuffer* request,
                                    ByteBuffer* response) override {
    return Reply<inference::ModelMetadataRequest, inference::ModelMetadataResponse>(
        context, request, response, [this](const auto& model, auto* reply) {
          EPS_RETURN_IF_ERROR(CheckServed("model metadata", model));
          FillModelMetadata(options_.model, reply);
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ModelConfig(CallbackServerContext* context, const ByteBuffer* request,
                                  ByteBuffer* response) override {
    return Reply<inference::ModelConfigRequest, inference::ModelConfigResponse>(
        context, request, response, [this](const auto& model, auto* reply) {
          EPS_RETURN_IF_ERROR(CheckServed("model config", model));
          FillModelConfig(options_.model, reply->mutable_config());
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* RepositoryIndex(CallbackServerContext* context, const ByteBuffer* request,
                                      ByteBuffer* response) override {
    return Reply<inference::RepositoryIndexRequest, inference::RepositoryIndexResponse>(
        context, request, response, [this](const auto& index, auto* reply) {
          FillRepositoryIndex(options_.model, sink_.ready(), index.ready(), reply);
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ModelInfer(CallbackServerContext* context, const ByteBuffer* request,
                                 ByteBuffer* response) override {
    return StartInferCall(context, request, response, infer_context_);
  }

  grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
  ModelStreamInfer(CallbackServerContext*) override {
    return new RefusedStream();
  }

  ServerUnaryReactor* ModelStatistics(CallbackServerContext* context, const ByteBuffer*,
                                      ByteBuffer*) override {
    return Refuse(context,
                  "model statistics: not kept in this form; read the Prometheus metrics instead");
  }

  ServerUnaryReactor* SystemSharedMemoryStatus(CallbackServerContext* context,
                                               const ByteBuffer* request,
                                               ByteBuffer* response) override {
    return Reply<inference::SystemSharedMemoryStatusRequest,
                 inference::SystemSharedMemoryStatusResponse>(
        context, request, response, [this](const auto& status, auto* reply) -> absl::Status {
          EPS_ASSIGN_OR_RETURN(const auto regions, regions_.List(status.name()));
          for (const ShmRegionInfo& info : regions) {
            auto& region = (*reply->mutable_regions())[info.name];
            region.set_name(info.name);
            region.set_key(info.key);
            region.set_offset(info.offset_bytes);
            region.set_byte_size(info.size_bytes);
          }
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* SystemSharedMemoryRegister(CallbackServerContext* context,
                                                 const ByteBuffer* request,
                                                 ByteBuffer* response) override {
    return Reply<inference::SystemSharedMemoryRegisterRequest,
                 inference::SystemSharedMemoryRegisterResponse>(
        context, request, response, [this](const auto& region, auto*) {
          return regions_.Register(region.name(), region.key(), region.offset(),
                                   region.byte_size());
        });
  }

  // Answers when the last request that uses the regions has let go of them: from then on the server
  // touches the memory no more.
  ServerUnaryReactor* SystemSharedMemoryUnregister(CallbackServerContext* context,
                                                   const ByteBuffer* request_bytes,
                                                   ByteBuffer* response_bytes) override {
    ServerUnaryReactor* reactor = context->DefaultReactor();
    const auto work = [&]() -> absl::Status {
      inference::SystemSharedMemoryUnregisterRequest request;
      EPS_RETURN_IF_ERROR(Parse(*request_bytes, &request));
      EPS_RETURN_IF_ERROR(
          Serialize(inference::SystemSharedMemoryUnregisterResponse(), response_bytes));
      return regions_.Unregister(request.name(), [reactor] { reactor->Finish(grpc::Status::OK); });
    };
    const absl::Status status = work();
    if (!status.ok()) reactor->Finish(server::ToGrpcStatus(status));
    return reactor;
  }

  ServerUnaryReactor* CudaSharedMemoryStatus(CallbackServerContext* context, const ByteBuffer*,
                                             ByteBuffer*) override {
    return Refuse(context, kNoCudaShm);
  }

  ServerUnaryReactor* CudaSharedMemoryRegister(CallbackServerContext* context, const ByteBuffer*,
                                               ByteBuffer*) override {
    return Refuse(context, kNoCudaShm);
  }

  ServerUnaryReactor* CudaSharedMemoryUnregister(CallbackServerContext* context,
                                                 const ByteBuffer* request,
                                                 ByteBuffer* response) override {
    return Reply<inference::CudaSharedMemoryUnregisterRequest,
                 inference::CudaSharedMemoryUnregisterResponse>(
        context, request, response, [](const auto& region, auto*) {
          return region.name().empty() ? absl::OkStatus() : absl::UnimplementedError(kNoCudaShm);
        });
  }

 private:
  template <typename Request>
  absl::Status CheckServed(const char* operation, const Request& request) const {
    return CheckModel(operation, request.name(), request.version(), options_.model);
  }

  const FrontDoorOptions options_;
  ShmRegistry& regions_;
  RequestSink& sink_;
  InferContext infer_context_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeInferService(FrontDoorOptions options, ShmRegistry* regions,
                                                RequestSink* sink) {
  return std::make_unique<InferService>(std::move(options), regions, sink);
}

}  // namespace epserve::coordinator
