#include "client/cpp/channel_security.h"

#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::client {

absl::Status CheckSecurity(const ChannelSecurity& security) {
  if (security.tls_cert.empty() != security.tls_key.empty() ||
      (!security.tls_cert.empty() && security.tls_ca.empty())) {
    return absl::InvalidArgumentError(
        "tls: --tls-cert and --tls-key belong together, and with --tls-ca; give all three, or "
        "--tls-ca alone");
  }
  for (const auto& [flag, path] :
       {std::pair<const char*, std::string>{"--tls-cert", security.tls_cert},
        {"--tls-key", security.tls_key},
        {"--tls-ca", security.tls_ca},
        {"--secret-file", security.secret_file}}) {
    std::string line;
    if (!path.empty() && !std::getline(std::ifstream(path), line)) {
      return absl::InvalidArgumentError(
          absl::StrCat("security: ", flag, " ", path, " is empty or cannot be read"));
    }
  }
  return absl::OkStatus();
}

}  // namespace epserve::client
