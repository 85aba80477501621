// Who may call what. A caller's roles come from its certificate or from a secret that it shows:
//
//   frontend   the front door (inference.GRPCInferenceService)
//   worker     the workers' stream (epserve.v1.Control)
//   metrics    the metrics (the path /metrics of their own port)
//   operator   everything but the workers' stream: all of the above, Admin, reflection, channelz
//
// Health is for everybody: probes have no identity.
//
// A certificate grants the roles that its URI names end in: spiffe://<anything>/epserve/<role>.
// A secret grants the role that stands before it in the secrets file.
// Thread-safe once made.
#ifndef EPSERVE_SERVER_COORDINATOR_ACCESS_POLICY_H_
#define EPSERVE_SERVER_COORDINATOR_ACCESS_POLICY_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::coordinator {

// What a scrape is called here, beside the names of gRPC's methods.
inline constexpr std::string_view kScrapeMethod = "/metrics";

enum Role : unsigned { kFrontend = 1, kWorker = 2, kOperator = 4, kMetrics = 8 };
using Roles = unsigned;  // Role values or'ed

// What a call shows of its caller.
struct Caller {
  bool encrypted = false;                     // the connection has TLS
  std::vector<std::string> certificate_uris;  // of a verified certificate, else empty
  std::string authorization;                  // the metadata of that name, "" where absent
};

class AccessPolicy {
 public:
  // `secrets_file`: lines "<role> <secret>"; empty: none. INVALID_ARGUMENT names file and line.
  // `tls_required`: a connection without it may ask for health alone.
  static absl::StatusOr<AccessPolicy> Create(const std::string& secrets_file, bool tls_required);

  // UNAUTHENTICATED: the caller shows nothing that is known; PERMISSION_DENIED: it may not call
  // `method` ("/package.Service/Method", or kScrapeMethod) in its roles; both say what is needed.
  absl::Status Check(std::string_view method, const Caller& caller) const;

 private:
  Roles RolesOf(const Caller& caller) const;

  bool tls_required_ = false;
  std::map<std::string, Roles> secrets_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ACCESS_POLICY_H_
