#include "server/coordinator/access_policy.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

constexpr std::string_view kRolePath = "/epserve/";
constexpr std::string_view kBearer = "Bearer ";

Roles RoleNamed(std::string_view name) {
  if (name == "frontend") return kFrontend;
  if (name == "worker") return kWorker;
  if (name == "operator") return kOperator;
  if (name == "metrics") return kMetrics;
  return 0;
}

// The roles of which one is needed; 0: none is.
Roles Needed(std::string_view method) {
  if (method.starts_with("/grpc.health.v1.Health/")) return 0;
  if (method.starts_with("/inference.GRPCInferenceService/")) return kFrontend | kOperator;
  if (method.starts_with("/epserve.v1.Control/")) return kWorker;
  if (method == kScrapeMethod) return kMetrics | kOperator;
  return kOperator;
}

std::string NamesOf(Roles roles) {
  std::string names;
  for (const auto& [role, name] : {std::pair<Roles, const char*>{kFrontend, "frontend"},
                                   {kWorker, "worker"},
                                   {kMetrics, "metrics"},
                                   {kOperator, "operator"}}) {
    if ((roles & role) != 0) absl::StrAppend(&names, names.empty() ? "" : " or ", name);
  }
  return names;
}

// In a time that does not depend on where they differ.
bool SameBytes(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

}  // namespace

absl::StatusOr<AccessPolicy> AccessPolicy::Create(const std::string& secrets_file,
                                                  bool tls_required) {
  AccessPolicy policy;
  policy.tls_required_ = tls_required;
  if (secrets_file.empty()) return policy;
  std::ifstream file(secrets_file);
  if (!file) {
    const std::string why = std::strerror(errno);
    return absl::NotFoundError(absl::StrCat("secrets: file ", secrets_file, " cannot be read (",
                                            why, "); give one that user ", ::geteuid(),
                                            " may read"));
  }
  constexpr std::size_t kLeastBytes = 16;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty() || line.starts_with('#')) continue;
    std::istringstream words(line);
    std::string role, secret, more;
    words >> role >> secret >> more;
    if (RoleNamed(role) == 0 || secret.size() < kLeastBytes || !more.empty()) {
      // Never the line itself: it may hold a secret.
      return absl::InvalidArgumentError(
          absl::StrCat("secrets: line ", number, " of ", secrets_file,
                       " is not \"<frontend|worker|operator|metrics> <secret of at least ",
                       kLeastBytes, " characters>\""));
    }
    policy.secrets_[secret] |= RoleNamed(role);
  }
  if (policy.secrets_.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("secrets: file ", secrets_file, " holds none"));
  }
  return policy;
}

Roles AccessPolicy::RolesOf(const Caller& caller) const {
  Roles roles = 0;
  for (const std::string_view uri : caller.certificate_uris) {
    const std::size_t at = uri.rfind(kRolePath);
    if (uri.starts_with("spiffe://") && at != uri.npos) {
      roles |= RoleNamed(uri.substr(at + kRolePath.size()));
    }
  }
  const std::string_view shown = caller.authorization;
  if (shown.starts_with(kBearer)) {
    for (const auto& [secret, granted] : secrets_) {
      if (SameBytes(secret, shown.substr(kBearer.size()))) roles |= granted;
    }
  }
  return roles;
}

absl::Status AccessPolicy::Check(std::string_view method, const Caller& caller) const {
  const Roles needed = Needed(method);
  if (needed == 0) return absl::OkStatus();
  if (tls_required_ && !caller.encrypted) {
    return absl::UnauthenticatedError(absl::StrCat("access: ", std::string(method),
                                                   " needs TLS; this port answers health checks "
                                                   "alone"));
  }
  const Roles roles = RolesOf(caller);
  if ((roles & needed) != 0) return absl::OkStatus();
  const std::string what =
      absl::StrCat("access: ", std::string(method), " needs the role ", NamesOf(needed));
  if (roles == 0) {
    return absl::UnauthenticatedError(absl::StrCat(
        what,
        ", and the caller shows none; give a certificate with the name "
        "URI:spiffe://<domain>/epserve/<role>, or a secret that the coordinator knows"));
  }
  return absl::PermissionDeniedError(absl::StrCat(what, "; the caller is ", NamesOf(roles)));
}

}  // namespace epserve::coordinator
