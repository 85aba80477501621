// OpenSSL's context of a server with TLS, from the same files as the gRPC server's credentials, and
// what its connections tell about their callers. Thread-safe.
#ifndef EPSERVE_SERVER_HTTP_TLS_CONTEXT_H_
#define EPSERVE_SERVER_HTTP_TLS_CONTEXT_H_

#include <openssl/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/common/tls.h"

namespace epserve::server {

struct TlsContextDeleter {
  void operator()(SSL_CTX* context) const;
};
using TlsContext = std::unique_ptr<SSL_CTX, TlsContextDeleter>;

// TLS 1.2 and later. With a `ca` every caller must show a certificate from it. INVALID_ARGUMENT: a
// file is no PEM file, or key and certificate do not belong together; names the file.
// REQUIRES: files.enabled().
absl::StatusOr<TlsContext> MakeTlsContext(const TlsFiles& files);

// The URI names of the certificate that the caller has shown and that was found good; else empty.
std::vector<std::string> CallerUris(const SSL* connection);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_HTTP_TLS_CONTEXT_H_
