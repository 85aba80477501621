// `epserve drain`.
#ifndef EPSERVE_CLIENT_COMMAND_DRAIN_H_
#define EPSERVE_CLIENT_COMMAND_DRAIN_H_

#include "absl/status/status.h"
#include "client/command/options.h"

namespace epserve::client {

absl::Status RunDrain(const DrainOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_DRAIN_H_
