// Asks a server for its health by the standard protocol, grpc.health.v1.
//
// Thread safety: any number of threads at once. Errors are the server's, as absl::Status.
#ifndef EPSERVE_CLIENT_CPP_HEALTH_CLIENT_H_
#define EPSERVE_CLIENT_CPP_HEALTH_CLIENT_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cpp/channel_security.h"

namespace epserve::client {

class HealthClient {
 public:
  // `target` is "HOST:PORT" or "unix:/PATH". Connecting happens on first use.
  explicit HealthClient(const std::string& target, const ChannelSecurity& security = {});
  ~HealthClient();
  HealthClient(const HealthClient&) = delete;
  HealthClient& operator=(const HealthClient&) = delete;

  // OK: `service` is serving. UNAVAILABLE: it is not, or nobody answers. NOT_FOUND: the server
  // knows no such service.
  absl::Status Check(const std::string& service, absl::Duration timeout);

 private:
  struct Core;
  std::unique_ptr<Core> core_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_HEALTH_CLIENT_H_
