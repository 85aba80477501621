// The port that Prometheus scrapes: GET /metrics, under the same certificates and secrets as the
// gRPC port, in the roles metrics and operator.
#ifndef EPSERVE_SERVER_COORDINATOR_METRICS_ENDPOINT_H_
#define EPSERVE_SERVER_COORDINATOR_METRICS_ENDPOINT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/common/tls.h"
#include "server/coordinator/access.h"
#include "server/coordinator/metrics.h"
#include "server/http/http_server.h"

namespace epserve::coordinator {

// `access` null: everybody may scrape. UNAVAILABLE: `listen` (HOST:PORT) cannot be bound. `metrics`
// outlives the server.
absl::StatusOr<std::unique_ptr<server::HttpServer>> ServeMetrics(const std::string& listen,
                                                                 const server::TlsFiles& tls,
                                                                 std::shared_ptr<Access> access,
                                                                 const Metrics* metrics);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_METRICS_ENDPOINT_H_
