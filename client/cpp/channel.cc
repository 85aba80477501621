#include "client/cpp/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/client_interceptor.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <fstream>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace epserve::client {

namespace {

// Replies of ordinary size come without waiting for this side to widen its window, and large ones
// in frames that are worth a system call each.
constexpr int kStreamWindowBytes = 16 << 20;
constexpr int kMaxFrameBytes = 1 << 20;

// Long beside what it takes to connect within a machine room, short beside what a caller notices.
constexpr absl::Duration kReconnectWait = absl::Milliseconds(100);

// How soon a renewed certificate or secret is taken up.
constexpr unsigned kRefreshSeconds = 1;

std::shared_ptr<grpc::ChannelCredentials> MakeCredentials(const ChannelSecurity& security) {
  if (security.tls_ca.empty()) return grpc::InsecureChannelCredentials();
  grpc::experimental::TlsChannelCredentialsOptions options;
  options.set_certificate_provider(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
          security.tls_key, security.tls_cert, security.tls_ca, kRefreshSeconds));
  options.watch_root_certs();
  if (!security.tls_cert.empty()) options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

// Shows the secret with every call of a channel. (gRPC's own call credentials refuse a channel
// without TLS, which a cluster with secrets may be.)
class SecretShower final : public grpc::experimental::Interceptor {
 public:
  explicit SecretShower(std::string authorization) : authorization_(std::move(authorization)) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", authorization_);
    }
    methods->Proceed();
  }

 private:
  const std::string authorization_;
};

// Reads the file again for a call that comes a second or more after the last reading, so that a
// renewed secret is shown without a new channel. Thread-safe.
class SecretShowerFactory final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit SecretShowerFactory(std::string path) : path_(std::move(path)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo*) override {
    return new SecretShower(Authorization());
  }

 private:
  std::string Authorization() {
    const auto now = std::chrono::steady_clock::now();
    const std::lock_guard lock(mutex_);
    if (authorization_.empty() || now - read_at_ >= std::chrono::seconds(kRefreshSeconds)) {
      read_at_ = now;
      std::string secret;
      // A file that is just being replaced: the last secret stays.
      if (std::ifstream file(path_); std::getline(file, secret)) {
        authorization_ = "Bearer " + secret;
      }
    }
    return authorization_;
  }

  const std::string path_;
  std::mutex mutex_;
  std::string authorization_;                      // Guarded by mutex_, as is the next.
  std::chrono::steady_clock::time_point read_at_;  // when the file was last looked at
};

}  // namespace

std::shared_ptr<grpc::Channel> CreateServiceChannel(const std::string& target,
                                                    const ChannelSecurity& security,
                                                    absl::Duration max_reconnect_backoff) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(INT_MAX);
  arguments.SetMaxSendMessageSize(INT_MAX);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kStreamWindowBytes);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kMaxFrameBytes);
  // A machine-wide http_proxy must not swallow a call to a loopback address.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // The service restarts within a second or two; gRPC's own first backoff is one second.
  const auto max_ms = static_cast<int>(absl::ToInt64Milliseconds(max_reconnect_backoff));
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, std::min(100, max_ms));
  // The name notwithstanding, this is the least time that an attempt to connect is given. A busy
  // server's TLS handshake takes more than 100 ms.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, max_ms);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, max_ms);
  // Retries are this library's business, where they are counted and can be cancelled.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  if (!security.tls_server_name.empty()) {
    arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, security.tls_server_name);
  }
  const auto credentials = MakeCredentials(security);
  if (security.secret_file.empty()) {
    return grpc::CreateCustomChannel(target, credentials, arguments);
  }
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> factories;
  factories.push_back(std::make_unique<SecretShowerFactory>(security.secret_file));
  return grpc::experimental::CreateCustomChannelWithInterceptors(target, credentials, arguments,
                                                                 std::move(factories));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  // gRPC and Abseil share their numbers.
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void AwaitReconnect(grpc::Channel& channel, absl::Time deadline) {
  if (channel.GetState(/*try_to_connect=*/true) != GRPC_CHANNEL_TRANSIENT_FAILURE) return;
  channel.WaitForConnected(absl::ToChronoTime(std::min(deadline, absl::Now() + kReconnectWait)));
}

void StartCall(grpc::Channel& channel, grpc::ClientContext& context, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
  AwaitReconnect(channel, deadline);
}

}  // namespace epserve::client
