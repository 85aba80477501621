#include "server/coordinator/access.h"

#include <utility>

#include "runtime/base/status.h"

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

}  // namespace

absl::StatusOr<std::shared_ptr<Access>> Access::Create(const server::TlsFiles& tls,
                                                       const std::string& secrets_file,
                                                       Refusals* refusals) {
  std::shared_ptr<Access> access(new Access(refusals));
  const auto load = [raw = access.get(), secrets_file,
                     tls_required = tls.enabled()]() -> absl::Status {
    EPS_ASSIGN_OR_RETURN(AccessPolicy policy, AccessPolicy::Create(secrets_file, tls_required));
    const std::lock_guard lock(raw->mutex_);
    raw->policy_ = std::make_shared<const AccessPolicy>(std::move(policy));
    return absl::OkStatus();
  };
  EPS_ASSIGN_OR_RETURN(access->watcher_, server::FileWatcher::Start({secrets_file}, load));
  return access;
}

absl::Status Access::Check(std::string_view method, const Caller& caller, const std::string& peer) {
  std::shared_ptr<const AccessPolicy> policy;
  {
    const std::lock_guard lock(mutex_);
    policy = policy_;
  }
  absl::Status status = policy->Check(method, caller);
  if (!status.ok()) refusals_->OnAccess(method, peer, status);
  return status;
}

void SetAccess(std::shared_ptr<Access> access, server::RpcServer* server) {
  server->SetAuthorizer(
      [access = std::move(access)](const std::string& method, grpc::ServerContext& context) {
        return access->Check(method, CallerOf(context), context.peer());
      });
}

}  // namespace epserve::coordinator
