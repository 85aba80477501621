// `epserve status`: what the cluster is doing.
#ifndef EPSERVE_CLIENT_COMMAND_STATUS_H_
#define EPSERVE_CLIENT_COMMAND_STATUS_H_

#include <string>

#include "absl/status/status.h"
#include "client/command/options.h"
#include "client/command/terminal.h"
#include "client/cpp/admin_client.h"
#include "nlohmann/json_fwd.hpp"

namespace epserve::client {

std::string RenderStatus(const ClusterState& cluster, const Terminal& terminal);
nlohmann::ordered_json StatusJson(const ClusterState& cluster);

absl::Status RunStatus(const StatusOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_STATUS_H_
