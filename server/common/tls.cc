#include "server/common/tls.h"

#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <algorithm>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::server {
namespace {

using grpc::experimental::FileWatcherCertificateProvider;
using grpc::experimental::TlsChannelCredentialsOptions;
using grpc::experimental::TlsServerCredentialsOptions;

// How soon a renewed certificate is taken up.
constexpr unsigned kRefreshSeconds = 1;

constexpr std::size_t kLeastSecretBytes = 16;

std::shared_ptr<FileWatcherCertificateProvider> Watch(const TlsFiles& files) {
  return std::make_shared<FileWatcherCertificateProvider>(files.key, files.cert, files.ca,
                                                          kRefreshSeconds);
}

}  // namespace

absl::Status CheckTlsFiles(const TlsFiles& files, bool ca_required) {
  const bool any = !files.cert.empty() || !files.key.empty() || !files.ca.empty();
  if (!any) return absl::OkStatus();
  if (files.cert.empty() || files.key.empty() || (ca_required && files.ca.empty())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tls: --tls-cert, --tls-key", ca_required ? " and --tls-ca" : "", " belong together, and ",
        files.cert.empty()  ? "--tls-cert"
        : files.key.empty() ? "--tls-key"
                            : "--tls-ca",
        " is missing"));
  }
  for (const auto& [flag, path] : {std::pair<const char*, std::string>{"--tls-cert", files.cert},
                                   {"--tls-key", files.key},
                                   {"--tls-ca", files.ca}}) {
    if (path.empty()) continue;
    std::ifstream file(path);
    if (!file || file.peek() == std::ifstream::traits_type::eof()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tls: ", flag, " ", path, " is empty or cannot be read; give a PEM file"));
    }
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const TlsFiles& files) {
  TlsServerCredentialsOptions options(Watch(files));
  options.watch_identity_key_cert_pairs();
  if (!files.ca.empty()) options.watch_root_certs();
  options.set_cert_request_type(files.ca.empty()
                                    ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                    : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  return grpc::experimental::TlsServerCredentials(options);
}

std::shared_ptr<grpc::ChannelCredentials> MakeChannelCredentials(const TlsFiles& files) {
  if (!files.enabled()) return grpc::InsecureChannelCredentials();
  TlsChannelCredentialsOptions options;
  options.set_certificate_provider(Watch(files));
  options.watch_identity_key_cert_pairs();
  options.watch_root_certs();
  return grpc::experimental::TlsCredentials(options);
}

absl::StatusOr<std::string> ReadSecret(const std::string& path) {
  std::ifstream file(path);
  std::string secret;
  if (!file || !std::getline(file, secret)) {
    return absl::NotFoundError(absl::StrCat("secret: file ", path, " is empty or cannot be read"));
  }
  const bool printable =
      std::all_of(secret.begin(), secret.end(), [](char c) { return c > ' ' && c <= '~'; });
  if (secret.size() < kLeastSecretBytes || !printable) {
    return absl::InvalidArgumentError(absl::StrCat(
        "secret: the first line of ", path, " is not a secret of at least ", kLeastSecretBytes,
        " printable characters without spaces; make one with: openssl rand -hex 32"));
  }
  return secret;
}

}  // namespace epserve::server
