#include "server/http/tls_context.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::server {
namespace {

absl::Status Refuse(const char* flag, const std::string& path, const char* why) {
  char cause[256] = "no cause given";
  if (const unsigned long error = ::ERR_get_error(); error != 0) {
    ::ERR_error_string_n(error, cause, sizeof(cause));
  }
  ::ERR_clear_error();
  return absl::InvalidArgumentError(
      absl::StrCat("tls: ", flag, " ", path, " ", why, " (", cause, "); give a PEM file"));
}

}  // namespace

void TlsContextDeleter::operator()(SSL_CTX* context) const { ::SSL_CTX_free(context); }

absl::StatusOr<TlsContext> MakeTlsContext(const TlsFiles& files) {
  ::ERR_clear_error();
  TlsContext context(::SSL_CTX_new(::TLS_server_method()));
  if (context == nullptr) return absl::ResourceExhaustedError("tls: no memory for a context");
  SSL_CTX* const raw = context.get();
  ::SSL_CTX_set_min_proto_version(raw, TLS1_2_VERSION);
  // No resumption: a session taken up again would outlive the authority that vouched for it.
  ::SSL_CTX_set_session_cache_mode(raw, SSL_SESS_CACHE_OFF);
  ::SSL_CTX_set_num_tickets(raw, 0);
  ::SSL_CTX_set_options(raw, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  if (::SSL_CTX_use_certificate_chain_file(raw, files.cert.c_str()) != 1) {
    return Refuse("--tls-cert", files.cert, "holds no certificate chain");
  }
  if (::SSL_CTX_use_PrivateKey_file(raw, files.key.c_str(), SSL_FILETYPE_PEM) != 1 ||
      ::SSL_CTX_check_private_key(raw) != 1) {
    return Refuse("--tls-key", files.key, "holds no private key of --tls-cert");
  }
  if (files.ca.empty()) return context;
  STACK_OF(X509_NAME)* const authorities = ::SSL_load_client_CA_file(files.ca.c_str());
  if (authorities == nullptr || ::SSL_CTX_load_verify_file(raw, files.ca.c_str()) != 1) {
    if (authorities != nullptr) sk_X509_NAME_pop_free(authorities, ::X509_NAME_free);
    return Refuse("--tls-ca", files.ca, "holds no certificates");
  }
  ::SSL_CTX_set_client_CA_list(raw, authorities);  // which it owns from here
  ::SSL_CTX_set_verify(raw, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  return context;
}

std::vector<std::string> CallerUris(const SSL* connection) {
  std::vector<std::string> uris;
  const X509* const certificate = ::SSL_get0_peer_certificate(connection);
  if (certificate == nullptr || ::SSL_get_verify_result(connection) != X509_V_OK) return uris;
  auto* const names = static_cast<GENERAL_NAMES*>(
      ::X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
  for (int i = 0; i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* const name = sk_GENERAL_NAME_value(names, i);
    if (name->type != GEN_URI) continue;
    const ASN1_IA5STRING* const uri = name->d.uniformResourceIdentifier;
    uris.emplace_back(reinterpret_cast<const char*>(::ASN1_STRING_get0_data(uri)),
                      static_cast<std::size_t>(::ASN1_STRING_length(uri)));
  }
  ::GENERAL_NAMES_free(names);
  return uris;
}

}  // namespace epserve::server
