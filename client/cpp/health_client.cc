#include "client/cpp/health_client.h"

#include "absl/strings/str_cat.h"
#include "client/cpp/channel.h"
#include "client/cpp/status.h"
#include "grpc/health/v1/health.grpc.pb.h"

namespace epserve::client {

using ::grpc::health::v1::Health;
using ::grpc::health::v1::HealthCheckRequest;
using ::grpc::health::v1::HealthCheckResponse;

struct HealthClient::Core {
  std::shared_ptr<::grpc::Channel> channel;
  std::unique_ptr<Health::Stub> stub;
};

HealthClient::HealthClient(const std::string& target, const ChannelSecurity& security)
    : core_(std::make_unique<Core>()) {
  core_->channel = CreateServiceChannel(target, security, absl::Seconds(1));
  core_->stub = Health::NewStub(core_->channel);
}

HealthClient::~HealthClient() = default;

absl::Status HealthClient::Check(const std::string& service, absl::Duration timeout) {
  ::grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  HealthCheckRequest request;
  request.set_service(service);
  HealthCheckResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->Check(&context, request, &response)));
  if (response.status() == HealthCheckResponse::SERVING) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("health: service '", service, "' is ",
                   HealthCheckResponse::ServingStatus_Name(response.status()),
                   ", not SERVING; epserve status shows what it waits for"));
}

}  // namespace epserve::client
