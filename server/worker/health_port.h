// A port of the worker's own that answers grpc.health.v1 in plaintext, and nothing else: for probes
// of what starts and watches over the worker. Thread-safe.
#ifndef EPSERVE_SERVER_WORKER_HEALTH_PORT_H_
#define EPSERVE_SERVER_WORKER_HEALTH_PORT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/rpc/health_service.h"
#include "server/rpc/rpc_server.h"

namespace epserve::worker {

class HealthPort {
 public:
  // Binds and answers: "liveness" serves from now on, "" and "readiness" once SetReady says so.
  // UNAVAILABLE where `address` (HOST:PORT or unix:PATH) cannot be bound.
  static absl::StatusOr<std::unique_ptr<HealthPort>> Listen(const std::string& address);
  ~HealthPort();
  HealthPort(const HealthPort&) = delete;
  HealthPort& operator=(const HealthPort&) = delete;

  void SetReady(bool ready);

 private:
  HealthPort() = default;

  server::Health health_;  // Outlives the server.
  server::RpcServer server_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_HEALTH_PORT_H_
