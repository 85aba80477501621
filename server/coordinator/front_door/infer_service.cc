#include "server/coordinator/front_door/infer_service.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "inference/grpc_service.pb.h"
#include "runtime/base/status.h"
#include "server/coordinator/front_door/infer_methods.h"
#include "server/coordinator/front_door/metadata_proto_convert.h"
#include "server/coordinator/front_door/request_validation.h"
#include "server/rpc/unary_call.h"

namespace epserve::coordinator {
namespace {

using server::RpcServer;
using server::ServerCall;
using server::UnaryCall;
using server::UnaryHandler;

std::string Method(const char* name) {
  return absl::StrCat("/inference.GRPCInferenceService/", name);
}

template <typename Request>
absl::Status CheckServed(const char* operation, const Request& request, const ServedModel& model) {
  return CheckModel(operation, request.name(), request.version(), model);
}

}  // namespace

struct InferService::Parts {
  Parts(FrontDoorOptions front_options, ShmRegistry* registry, RequestSink* request_sink,
        DeviceRegionHost* device_host)
      : options(std::move(front_options)),
        regions(*registry),
        sink(*request_sink),
        devices(*device_host),
        infer{options, *registry, *request_sink} {}

  void AddServerMethods(RpcServer* server);
  void AddModelMethods(RpcServer* server);
  void AddSystemShmMethods(RpcServer* server);
  void AddCudaShmMethods(RpcServer* server);
  void RegisterCuda(UnaryCall call, const grpc::ByteBuffer& bytes);
  void UnregisterCuda(UnaryCall call, const grpc::ByteBuffer& bytes);

  const FrontDoorOptions options;
  ShmRegistry& regions;
  RequestSink& sink;
  DeviceRegionHost& devices;
  InferContext infer;
};

void InferService::Parts::AddServerMethods(RpcServer* server) {
  server->Handle(Method("ServerLive"),
                 UnaryHandler<inference::ServerLiveRequest, inference::ServerLiveResponse>(
                     [](const auto&, auto* reply) {
                       reply->set_live(true);
                       return absl::OkStatus();
                     }));
  server->Handle(Method("ServerReady"),
                 UnaryHandler<inference::ServerReadyRequest, inference::ServerReadyResponse>(
                     [this](const auto&, auto* reply) {
                       reply->set_ready(sink.ready());
                       return absl::OkStatus();
                     }));
  server->Handle(Method("ServerMetadata"),
                 UnaryHandler<inference::ServerMetadataRequest, inference::ServerMetadataResponse>(
                     [this](const auto&, auto* reply) {
                       FillServerMetadata(regions.allowed(), reply);
                       return absl::OkStatus();
                     }));
  server->Handle(
      Method("RepositoryIndex"),
      UnaryHandler<inference::RepositoryIndexRequest, inference::RepositoryIndexResponse>(
          [this](const auto& index, auto* reply) {
            FillRepositoryIndex(options.model, sink.ready(), index.ready(), reply);
            return absl::OkStatus();
          }));
}

void InferService::Parts::AddModelMethods(RpcServer* server) {
  server->Handle(Method("ModelReady"),
                 UnaryHandler<inference::ModelReadyRequest, inference::ModelReadyResponse>(
                     [this](const auto& model, auto* reply) {
                       EPS_RETURN_IF_ERROR(CheckServed("model ready", model, options.model));
                       reply->set_ready(sink.ready());
                       return absl::OkStatus();
                     }));
  server->Handle(Method("ModelMetadata"),
                 UnaryHandler<inference::ModelMetadataRequest, inference::ModelMetadataResponse>(
                     [this](const auto& model, auto* reply) {
                       EPS_RETURN_IF_ERROR(CheckServed("model metadata", model, options.model));
                       FillModelMetadata(options.model, reply);
                       return absl::OkStatus();
                     }));
  server->Handle(Method("ModelConfig"),
                 UnaryHandler<inference::ModelConfigRequest, inference::ModelConfigResponse>(
                     [this](const auto& model, auto* reply) {
                       EPS_RETURN_IF_ERROR(CheckServed("model config", model, options.model));
                       FillModelConfig(options.model, reply->mutable_config());
                       return absl::OkStatus();
                     }));
  server->Handle(
      Method("ModelStatistics"),
      UnaryHandler<inference::ModelStatisticsRequest, inference::ModelStatisticsResponse>(
          [this](const auto& model, auto* reply) {
            // An empty name means every model, and there is one.
            if (!model.name().empty()) {
              EPS_RETURN_IF_ERROR(CheckServed("model statistics", model, options.model));
            }
            FillModelStatistics(options.model, infer.statistics.Snapshot(), reply);
            return absl::OkStatus();
          }));
  // These have tensors; CheckRequestBounds sees to the rest.
  server->Handle(
      Method("ModelInfer"), [this](ServerCall* call) { return StartUnaryInfer(call, infer); },
      RpcServer::Places::kCounted, server::kAnyMessageBytes);
  server->Handle(
      Method("ModelStreamInfer"),
      [this](ServerCall* call) { return StartStreamInfer(call, infer); },
      RpcServer::Places::kCounted, server::kAnyMessageBytes);
}

void InferService::Parts::AddSystemShmMethods(RpcServer* server) {
  server->Handle(Method("SystemSharedMemoryStatus"),
                 UnaryHandler<inference::SystemSharedMemoryStatusRequest,
                              inference::SystemSharedMemoryStatusResponse>(
                     [this](const auto& status, auto* reply) -> absl::Status {
                       EPS_ASSIGN_OR_RETURN(const auto listed,
                                            regions.List(ShmKind::kSystem, status.name()));
                       for (const ShmRegionInfo& info : listed) {
                         auto& region = (*reply->mutable_regions())[info.name];
                         region.set_name(info.name);
                         region.set_key(info.key);
                         region.set_offset(info.offset_bytes);
                         region.set_byte_size(info.size_bytes);
                       }
                       return absl::OkStatus();
                     }));
  server->Handle(Method("SystemSharedMemoryRegister"),
                 UnaryHandler<inference::SystemSharedMemoryRegisterRequest,
                              inference::SystemSharedMemoryRegisterResponse>(
                     [this](const auto& region, auto*) {
                       return regions.Register(region.name(), region.key(), region.offset(),
                                               region.byte_size());
                     }));
  // Answers when the last request that uses the regions has let go of them: from then on the server
  // touches the memory no more.
  server->Handle(Method("SystemSharedMemoryUnregister"),
                 UnaryHandler([this](UnaryCall call, const grpc::ByteBuffer& bytes) {
                   inference::SystemSharedMemoryUnregisterRequest request;
                   const absl::Status parsed = server::ParseMessage(bytes, &request);
                   if (!parsed.ok()) return call.Fail(parsed);
                   // The registry's callback must be copyable, so the call is held from outside.
                   auto held = std::make_shared<UnaryCall>(std::move(call));
                   const absl::Status status =
                       regions.Unregister(ShmKind::kSystem, request.name(), [held](const auto&) {
                         held->Reply(inference::SystemSharedMemoryUnregisterResponse());
                       });
                   if (!status.ok()) held->Fail(status);
                 }));
}

// Register and Unregister answer once the workers have.
void InferService::Parts::RegisterCuda(UnaryCall call, const grpc::ByteBuffer& bytes) {
  inference::CudaSharedMemoryRegisterRequest request;
  const absl::Status parsed = server::ParseMessage(bytes, &request);
  if (!parsed.ok()) return call.Fail(parsed);
  auto region = regions.ReserveCuda(request.name(), request.raw_handle(), request.device_id(),
                                    request.byte_size());
  if (!region.ok()) return call.Fail(region.status());
  auto held = std::make_shared<UnaryCall>(std::move(call));
  devices.OpenDeviceRegion(*region, [this, held, region = *region](const absl::Status& opened) {
    if (!opened.ok()) regions.Withdraw(*region);
    const absl::Status status = opened.ok() ? regions.Confirm(*region) : opened;
    if (!status.ok()) return held->Fail(status);
    held->Reply(inference::CudaSharedMemoryRegisterResponse());
  });
}

void InferService::Parts::UnregisterCuda(UnaryCall call, const grpc::ByteBuffer& bytes) {
  inference::CudaSharedMemoryUnregisterRequest request;
  const absl::Status parsed = server::ParseMessage(bytes, &request);
  if (!parsed.ok()) return call.Fail(parsed);
  auto held = std::make_shared<UnaryCall>(std::move(call));
  const auto answer = [held](const absl::Status& closed) {
    if (!closed.ok()) return held->Fail(closed);
    held->Reply(inference::CudaSharedMemoryUnregisterResponse());
  };
  if (!regions.allowed() && request.name().empty()) return answer(absl::OkStatus());
  const absl::Status status = regions.Unregister(
      ShmKind::kCuda, request.name(), [this, answer](const std::vector<std::uint64_t>& ids) {
        devices.CloseDeviceRegions(ids, answer);
      });
  if (!status.ok()) held->Fail(status);
}

void InferService::Parts::AddCudaShmMethods(RpcServer* server) {
  server->Handle(Method("CudaSharedMemoryStatus"),
                 UnaryHandler<inference::CudaSharedMemoryStatusRequest,
                              inference::CudaSharedMemoryStatusResponse>(
                     [this](const auto& status, auto* reply) -> absl::Status {
                       EPS_ASSIGN_OR_RETURN(const auto listed,
                                            regions.List(ShmKind::kCuda, status.name()));
                       for (const ShmRegionInfo& info : listed) {
                         auto& region = (*reply->mutable_regions())[info.name];
                         region.set_name(info.name);
                         region.set_device_id(static_cast<std::uint64_t>(info.device_id));
                         region.set_byte_size(info.size_bytes);
                       }
                       return absl::OkStatus();
                     }));
  server->Handle(Method("CudaSharedMemoryRegister"),
                 UnaryHandler([this](UnaryCall call, const grpc::ByteBuffer& bytes) {
                   RegisterCuda(std::move(call), bytes);
                 }));
  server->Handle(Method("CudaSharedMemoryUnregister"),
                 UnaryHandler([this](UnaryCall call, const grpc::ByteBuffer& bytes) {
                   UnregisterCuda(std::move(call), bytes);
                 }));
}

InferService::InferService(FrontDoorOptions options, ShmRegistry* regions, RequestSink* sink,
                           DeviceRegionHost* devices)
    : parts_(std::make_unique<Parts>(std::move(options), regions, sink, devices)) {}

InferService::~InferService() = default;

void InferService::AddTo(RpcServer* server) {
  parts_->AddServerMethods(server);
  parts_->AddModelMethods(server);
  parts_->AddSystemShmMethods(server);
  parts_->AddCudaShmMethods(server);
}

}  // namespace epserve::coordinator
