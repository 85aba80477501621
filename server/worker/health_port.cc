#include "server/worker/health_port.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <chrono>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace epserve::worker {
namespace {

// A health check's request is a name.
constexpr int kMaxMessageBytes = 4096;

}  // namespace

absl::StatusOr<std::unique_ptr<HealthPort>> HealthPort::Listen(const std::string& address) {
  std::unique_ptr<HealthPort> port(new HealthPort);
  port->health_.AddTo(&port->server_);
  port->health_.Set("liveness", true);
  port->SetReady(false);
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // Without this a second worker would share the port silently.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  int bound = 0;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &bound);
  // gRPC gives 0 for an address that it could not bind.
  if (!port->server_.Start(&builder, /*num_threads=*/1) || bound == 0) {
    return absl::UnavailableError(absl::StrCat("listen: address ", address,
                                               " cannot be bound; free it or give another "
                                               "--health-listen"));
  }
  return port;
}

HealthPort::~HealthPort() {
  health_.ShutDown();
  server_.Stop(std::chrono::milliseconds(0));
}

void HealthPort::SetReady(bool ready) {
  health_.Set("", ready);
  health_.Set("readiness", ready);
}

}  // namespace epserve::worker
