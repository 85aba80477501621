// grpc.health.v1 of the coordinator's server: "liveness" serves while the process runs, "" and
// "readiness" follow readiness. Thread-safe.
#ifndef EPSERVE_SERVER_COORDINATOR_HEALTH_H_
#define EPSERVE_SERVER_COORDINATOR_HEALTH_H_

#include <grpcpp/server.h>

namespace epserve::coordinator {

// Makes every server that is built afterwards carry the health service (Check and Watch). Call once
// before the server is built, from one thread.
void EnableHealthService();

// Not ready, alive. Call right after the server is started.
void StartHealth(grpc::Server* server);

void SetHealthReady(grpc::Server* server, bool ready);

// Tells every watcher NOT_SERVING, for good.
void EndHealth(grpc::Server* server);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_HEALTH_H_
