// How a client is known to the service, and how it knows the service.
#ifndef EPSERVE_CLIENT_CPP_CHANNEL_SECURITY_H_
#define EPSERVE_CLIENT_CPP_CHANNEL_SECURITY_H_

#include <string>

#include "absl/status/status.h"

namespace epserve::client {

// All empty: plaintext, and nothing is shown.
struct ChannelSecurity {
  std::string tls_cert;  // PEM chain to show; read again when it changes, as all of these
  std::string tls_key;   // PEM private key of tls_cert
  std::string tls_ca;    // PEM authorities that the service's certificate must come from
  std::string
      tls_server_name;      // that the service's certificate must have; empty: the target's host
  std::string secret_file;  // its first line is shown with every call; read again as the others
};

// INVALID_ARGUMENT: only some of what belongs together is given, or a file cannot be read. `tls_ca`
// alone is TLS without a certificate of one's own.
absl::Status CheckSecurity(const ChannelSecurity& security);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CHANNEL_SECURITY_H_
