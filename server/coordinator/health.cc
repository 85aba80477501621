#include "server/coordinator/health.h"

#include <grpcpp/health_check_service_interface.h>

namespace epserve::coordinator {

void EnableHealthService() { grpc::EnableDefaultHealthCheckService(true); }

void StartHealth(grpc::Server* server) {
  SetHealthReady(server, false);
  server->GetHealthCheckService()->SetServingStatus("liveness", true);
}

void SetHealthReady(grpc::Server* server, bool ready) {
  server->GetHealthCheckService()->SetServingStatus("", ready);
  server->GetHealthCheckService()->SetServingStatus("readiness", ready);
}

void EndHealth(grpc::Server* server) { server->GetHealthCheckService()->Shutdown(); }

}  // namespace epserve::coordinator
