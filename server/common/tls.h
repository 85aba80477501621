// TLS of coordinator and workers: each side shows its certificate and checks the other's against
// the same authority. The files are looked at again while the process runs, so that renewed
// certificates take effect without a restart. Thread-safe.
#ifndef EPSERVE_SERVER_COMMON_TLS_H_
#define EPSERVE_SERVER_COMMON_TLS_H_

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::server {

struct TlsFiles {
  std::string cert;  // PEM chain of this process, empty: no TLS
  std::string key;   // PEM private key
  std::string ca;    // PEM authorities that the other side's certificate must come from

  bool enabled() const { return !cert.empty(); }
};

// INVALID_ARGUMENT: only some of the three are given, or a file cannot be read; names the flag. A
// server may leave `ca` out where callers show secrets instead of certificates.
absl::Status CheckTlsFiles(const TlsFiles& files, bool ca_required);

// REQUIRES: files.enabled() and CheckTlsFiles(files). With a `ca` the caller must show a
// certificate.
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const TlsFiles& files);

// Plaintext where TLS is not enabled. The server's certificate must name the host that is called.
std::shared_ptr<grpc::ChannelCredentials> MakeChannelCredentials(const TlsFiles& files);

// The secret in `path`: its first line. INVALID_ARGUMENT: it has fewer than 16 characters or others
// than printable ones without spaces; NOT_FOUND: it cannot be read.
absl::StatusOr<std::string> ReadSecret(const std::string& path);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_TLS_H_
