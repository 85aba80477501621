// The Control service: one bidirectional stream a worker. Converts and posts to the host; never
// blocks.
#ifndef EPSERVE_SERVER_COORDINATOR_CONTROL_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_CONTROL_SERVICE_H_

#include <grpcpp/impl/service_type.h>

#include <memory>

#include "server/coordinator/hello_check.h"
#include "server/coordinator/host.h"

namespace epserve::coordinator {

// `host` outlives the service and the server that it is registered with.
std::unique_ptr<grpc::Service> CreateControlService(Host* host, HelloPolicy policy);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_CONTROL_SERVICE_H_
