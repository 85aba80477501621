// `epserve health`: is the service healthy; for probes that go by the exit code.
#ifndef EPSERVE_CLIENT_COMMAND_HEALTH_H_
#define EPSERVE_CLIENT_COMMAND_HEALTH_H_

#include "absl/status/status.h"
#include "client/command/options.h"

namespace epserve::client {

absl::Status RunHealth(const HealthOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_HEALTH_H_
