// A small HTTP/1.1 server for what is not gRPC: scrapes of the metrics. One request a connection,
// GET and HEAD alone, with TLS or without; one thread that never waits for any one caller.
//
// What a caller may take is bounded: its time from the accept to the last byte, the bytes of its
// request, and the number of connections, of which one too many ends the oldest.
//
// Thread-safe.
#ifndef EPSERVE_SERVER_HTTP_HTTP_SERVER_H_
#define EPSERVE_SERVER_HTTP_HTTP_SERVER_H_

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/common/tls.h"

namespace epserve::server {

struct HttpRequest {
  std::string target;                         // path and query, as sent
  std::string authorization;                  // the header of that name, "" where absent
  bool encrypted = false;                     // the connection has TLS
  std::vector<std::string> certificate_uris;  // of a verified certificate, else empty
  std::string peer;                           // ADDRESS:PORT
};

struct HttpReply {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

struct HttpServerOptions {
  std::string listen;  // HOST:PORT; port 0: any free one
  TlsFiles tls;        // read again when they change; not enabled: plaintext
  std::size_t max_connections = 64;
  std::size_t max_request_bytes = 16 << 10;
  std::chrono::milliseconds max_time{10'000};
};

class HttpServer {
 public:
  // Called in the server's thread, and so must not block for long.
  using Handler = std::function<HttpReply(const HttpRequest&)>;

  // UNAVAILABLE names the address that cannot be bound, and why; INVALID_ARGUMENT: see
  // MakeTlsContext().
  static absl::StatusOr<std::unique_ptr<HttpServer>> Create(HttpServerOptions options,
                                                            Handler handler);
  ~HttpServer();  // Ends every connection; `handler` does not run after it.
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_HTTP_HTTP_SERVER_H_
