#include "server/coordinator/access.h"

#include <memory>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "server/common/log_limit.h"
#include "server/coordinator/access_policy.h"

namespace epserve::coordinator {
namespace {

// gRPC's names of what a connection has been found to be.
constexpr char kUriProperty[] = "peer_uri";
constexpr char kTransportProperty[] = "transport_security_type";
constexpr std::string_view kTlsTransports[] = {"tls", "ssl"};  // by kind of credentials

Caller CallerOf(grpc::ServerContext& context) {
  Caller caller;
  if (const auto identity = context.auth_context(); identity != nullptr) {
    for (const grpc::string_ref& transport : identity->FindPropertyValues(kTransportProperty)) {
      const std::string_view name(transport.data(), transport.size());
      caller.encrypted = name == kTlsTransports[0] || name == kTlsTransports[1];
    }
    if (identity->IsPeerAuthenticated()) {
      for (const grpc::string_ref& uri : identity->FindPropertyValues(kUriProperty)) {
        caller.certificate_uris.emplace_back(uri.data(), uri.size());
      }
    }
  }
  const auto& metadata = context.client_metadata();
  if (const auto found = metadata.find("authorization"); found != metadata.end()) {
    caller.authorization.assign(found->second.data(), found->second.size());
  }
  return caller;
}

// Without the port, which is another for each connection.
std::string HostOf(const std::string& peer) { return peer.substr(0, peer.rfind(':')); }

}  // namespace

absl::Status SetAccess(const server::TlsFiles& tls, const std::string& secrets_file,
                       server::RpcServer* server) {
  if (!tls.enabled() && secrets_file.empty()) return absl::OkStatus();
  EPS_ASSIGN_OR_RETURN(AccessPolicy policy, AccessPolicy::Create(secrets_file, tls.enabled()));
  server->SetAuthorizer([policy = std::move(policy), limit = std::make_shared<server::LogLimit>()](
                            const std::string& method, grpc::ServerContext& context) {
    absl::Status status = policy.Check(method, CallerOf(context));
    if (!status.ok() && limit->Allows(absl::StrCat(method, " ", HostOf(context.peer())))) {
      runtime::LogWarning("call_refused",
                          {{"method", method}, {"peer", context.peer()}, {"status", status}});
    }
    return status;
  });
  return absl::OkStatus();
}

}  // namespace epserve::coordinator
