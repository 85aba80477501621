#include "server/coordinator/metrics_endpoint.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

// Prometheus' text format, whose version this is.
constexpr char kContentType[] = "text/plain; version=0.0.4; charset=utf-8";

server::HttpReply Answer(const server::HttpRequest& request, Access* access,
                         const Metrics& metrics) {
  server::HttpReply reply;
  if (request.target != kScrapeMethod && !request.target.starts_with("/metrics?")) {
    reply.status = 404;
    reply.body = "only /metrics is here\n";
    return reply;
  }
  if (access != nullptr) {
    const Caller caller{request.encrypted, request.certificate_uris, request.authorization};
    const absl::Status allowed = access->Check(kScrapeMethod, caller, request.peer);
    if (!allowed.ok()) {
      reply.status = absl::IsPermissionDenied(allowed) ? 403 : 401;
      reply.body = absl::StrCat(std::string(allowed.message()), "\n");
      return reply;
    }
  }
  reply.content_type = kContentType;
  reply.body = metrics.Render();
  return reply;
}

}  // namespace

absl::StatusOr<std::unique_ptr<server::HttpServer>> ServeMetrics(const std::string& listen,
                                                                 const server::TlsFiles& tls,
                                                                 std::shared_ptr<Access> access,
                                                                 const Metrics* metrics) {
  server::HttpServerOptions options;
  options.listen = listen;
  options.tls = tls;
  auto served = server::HttpServer::Create(
      std::move(options),
      [access = std::move(access), metrics](const server::HttpRequest& request) {
        return Answer(request, access.get(), *metrics);
      });
  if (served.ok() || !absl::IsUnavailable(served.status())) return served;
  return absl::UnavailableError(absl::StrCat("metrics: ", std::string(served.status().message()),
                                             "; free it or give another --metrics-listen"));
}

}  // namespace epserve::coordinator
