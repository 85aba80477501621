#include "server/http/http_server.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/ssl/ssl_stream.hpp>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "server/common/file_watcher.h"
#include "server/common/log_limit.h"
#include "server/common/peer_host.h"
#include "server/http/tls_context.h"

namespace epserve::server {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using boost::system::error_code;
using Tcp = asio::ip::tcp;
using SslContext = std::shared_ptr<asio::ssl::context>;

// After an accept that failed, as for want of a file descriptor: until the next is tried.
constexpr std::chrono::milliseconds kAcceptPause{100};

std::string AddressOf(const beast::tcp_stream& stream) {
  error_code error;
  const Tcp::endpoint peer = stream.socket().remote_endpoint(error);
  return error ? "unknown" : peer.address().to_string();
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(HttpServerOptions options, Handler handler)
      : options_(std::move(options)), handler_(std::move(handler)) {}

  ~Impl();

  absl::Status Start() {
    if (options_.tls.enabled()) {
      EPS_ASSIGN_OR_RETURN(
          watcher_, FileWatcher::Start({options_.tls.cert, options_.tls.key, options_.tls.ca},
                                       [this] { return LoadTls(); }));
    }
    EPS_RETURN_IF_ERROR(Bind());
    Accept();
    thread_ = std::thread([this] { io_.run(); });
    return absl::OkStatus();
  }

  int port() const { return port_; }

 private:
  class Connection;
  using Connections = std::list<std::shared_ptr<Connection>>;

  absl::Status LoadTls() {
    EPS_ASSIGN_OR_RETURN(TlsContext made, MakeTlsContext(options_.tls));
    auto context = std::make_shared<asio::ssl::context>(made.release());  // which it owns
    const std::lock_guard lock(tls_mutex_);
    tls_ = std::move(context);
    return absl::OkStatus();
  }
  SslContext tls() const {
    const std::lock_guard lock(tls_mutex_);
    return tls_;
  }

  absl::Status Bind() {
    const auto refuse = [this](const error_code& error) {
      return absl::UnavailableError(absl::StrCat("http: address ", options_.listen,
                                                 " cannot be bound (", error.message(), ")"));
    };
    const std::size_t colon = options_.listen.rfind(':');
    std::string host = options_.listen.substr(0, colon);
    if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
    error_code error;
    const auto found = Tcp::resolver(io_).resolve(host, options_.listen.substr(colon + 1),
                                                  Tcp::resolver::passive, error);
    if (error) return refuse(error);
    const Tcp::endpoint address = *found.begin();
    acceptor_.open(address.protocol(), error);
    // Connections that the last process closed must not hold its address.
    if (!error) acceptor_.set_option(Tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor_.bind(address, error);
    if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    if (error) return refuse(error);
    port_ = acceptor_.local_endpoint(error).port();
    return absl::OkStatus();
  }

  void Accept() {
    acceptor_.async_accept([this](const error_code& error, Tcp::socket socket) {
      if (stopping_ || error == asio::error::operation_aborted) return;
      if (!error) {
        Serve(std::move(socket));
        return Accept();
      }
      if (log_limit_.Allows("accept")) {
        runtime::LogWarning("http_accept_failed", {{"error", error.message()}});
      }
      retry_.expires_after(kAcceptPause);
      retry_.async_wait([this](const error_code& cancelled) {
        if (!cancelled && !stopping_) Accept();
      });
    });
  }

  void Serve(Tcp::socket socket);

  const HttpServerOptions options_;
  const Handler handler_;
  asio::io_context io_{1};
  Tcp::acceptor acceptor_{io_};
  asio::steady_timer retry_{io_};
  int port_ = 0;
  mutable std::mutex tls_mutex_;
  SslContext tls_;  // Guarded by tls_mutex_; null: plaintext.
  std::unique_ptr<FileWatcher> watcher_;

  // Of the server's thread.
  LogLimit log_limit_;
  Connections connections_;  // oldest first
  bool stopping_ = false;
  std::thread thread_;
};

// Kept by the operation that it waits for; among the server's connections until it ends.
class HttpServer::Impl::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Impl* server, Tcp::socket socket, SslContext tls)
      : server_(server), tls_(std::move(tls)) {
    beast::tcp_stream stream(std::move(socket));
    // Once for all that it does: who sends a byte now and then is not granted more.
    stream.expires_after(server->options_.max_time);
    if (tls_ != nullptr) {
      encrypted_.emplace(std::move(stream), *tls_);
    } else {
      plain_.emplace(std::move(stream));
    }
    parser_.header_limit(static_cast<std::uint32_t>(server->options_.max_request_bytes));
    parser_.body_limit(0);
  }

  void Start(Connections::iterator place) {
    place_ = place;
    if (!encrypted_) return Read();
    encrypted_->async_handshake(asio::ssl::stream_base::server, [self = shared_from_this()](
                                                                    const error_code& error) {
      if (!error) return self->Read();
      const std::string peer = AddressOf(self->transport());
      if (self->server_->log_limit_.Allows(PeerHost(peer))) {
        runtime::LogWarning("http_handshake_refused", {{"peer", peer}, {"cause", error.message()}});
      }
      self->End();
    });
  }

  void Close() {
    error_code ignored;
    transport().socket().close(ignored);
  }

 private:
  beast::tcp_stream& transport() { return encrypted_ ? encrypted_->next_layer() : *plain_; }

  template <typename Use>
  void WithStream(Use use) {
    if (encrypted_) {
      use(*encrypted_);
    } else {
      use(*plain_);
    }
  }

  void Read() {
    WithStream([this](auto& stream) {
      http::async_read_header(stream, buffer_, parser_,
                              [self = shared_from_this()](const error_code& error, std::size_t) {
                                self->Answer(error);
                              });
    });
  }

  void Answer(const error_code& error) {
    HttpReply reply;
    bool body_wanted = true;
    if (error == http::error::header_limit) {
      reply = {431, "text/plain; charset=utf-8", "the request's header is too long\n"};
    } else if (error && error.category() == http::make_error_code(http::error{}).category() &&
               error != http::error::end_of_stream && error != http::error::partial_message) {
      reply = {400, "text/plain; charset=utf-8", "this is no HTTP request\n"};
    } else if (error) {
      return End();  // It has gone, or was too slow.
    } else {
      const auto& request = parser_.get();
      body_wanted = request.method() != http::verb::head;
      if (request.method() != http::verb::get && request.method() != http::verb::head) {
        reply = {405, "text/plain; charset=utf-8", "GET and HEAD alone are answered here\n"};
      } else {
        reply = server_->handler_(MakeRequest(request));
      }
    }
    Write(std::move(reply), body_wanted);
  }

  HttpRequest MakeRequest(const http::request<http::empty_body>& request) {
    HttpRequest made;
    made.target = std::string(request.target());
    made.authorization = std::string(request[http::field::authorization]);
    made.peer = AddressOf(transport());
    if (encrypted_) {
      made.encrypted = true;
      made.certificate_uris = CallerUris(encrypted_->native_handle());
    }
    return made;
  }

  void Write(HttpReply reply, bool body_wanted) {
    response_.result(static_cast<unsigned>(reply.status));
    response_.set(http::field::content_type, reply.content_type);
    if (reply.status == 401) response_.set(http::field::www_authenticate, "Bearer");
    response_.keep_alive(false);
    response_.content_length(reply.body.size());
    if (body_wanted) response_.body() = std::move(reply.body);
    WithStream([this](auto& stream) {
      http::async_write(stream, response_,
                        [self = shared_from_this()](const error_code& error, std::size_t) {
                          self->Finish(error);
                        });
    });
  }

  void Finish(const error_code& error) {
    if (error && error != http::error::end_of_stream) return End();
    if (!encrypted_) {
      error_code ignored;
      plain_->socket().shutdown(Tcp::socket::shutdown_send, ignored);
      return End();
    }
    // Tells the caller that nothing was cut off.
    encrypted_->async_shutdown([self = shared_from_this()](const error_code&) { self->End(); });
  }

  void End() {
    Close();
    server_->connections_.erase(place_);
  }

  Impl* const server_;
  const SslContext tls_;  // outlives encrypted_, whatever the server takes up meanwhile
  std::optional<beast::tcp_stream> plain_;  // this or the other
  std::optional<beast::ssl_stream<beast::tcp_stream>> encrypted_;
  beast::flat_buffer buffer_;
  http::request_parser<http::empty_body> parser_;
  http::response<http::string_body> response_;
  Connections::iterator place_;
};

HttpServer::Impl::~Impl() {
  watcher_.reset();
  asio::post(io_, [this] {
    stopping_ = true;
    error_code ignored;
    acceptor_.close(ignored);
    retry_.cancel();
    for (const auto& connection : connections_) connection->Close();
  });
  // Which ends once every operation has come back.
  if (thread_.joinable()) thread_.join();
}

void HttpServer::Impl::Serve(Tcp::socket socket) {
  if (connections_.size() >= options_.max_connections) connections_.front()->Close();
  const auto connection = std::make_shared<Connection>(this, std::move(socket), tls());
  connection->Start(connections_.insert(connections_.end(), connection));
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Create(HttpServerOptions options,
                                                               Handler handler) {
  auto impl = std::make_unique<Impl>(std::move(options), std::move(handler));
  EPS_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->port(); }

}  // namespace epserve::server
