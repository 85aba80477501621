// Puts the access policy before every call of a server.
#ifndef EPSERVE_SERVER_COORDINATOR_ACCESS_H_
#define EPSERVE_SERVER_COORDINATOR_ACCESS_H_

#include <string>

#include "absl/status/status.h"
#include "server/common/tls.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

// Where neither certificates nor secrets are asked for, whoever reaches an address may call, and
// nothing is done. A caller that is refused is logged once a minute and method.
absl::Status SetAccess(const server::TlsFiles& tls, const std::string& secrets_file,
                       server::RpcServer* server);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ACCESS_H_
