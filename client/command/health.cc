#include "client/command/health.h"

#include <cstdio>

#include "absl/time/time.h"
#include "client/cpp/health_client.h"
#include "client/cpp/status.h"

namespace epserve::client {

absl::Status RunHealth(const HealthOptions& options) {
  HealthClient client(options.server, options.security);
  EPC_RETURN_IF_ERROR(client.Check(options.service, absl::Seconds(options.timeout_s)));
  std::printf("%s: serving\n", options.service.c_str());
  return absl::OkStatus();
}

}  // namespace epserve::client
