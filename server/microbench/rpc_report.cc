#include "server/microbench/rpc_report.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace epserve::microbench {
namespace {

using runtime::Percentiles;

// A key and its two figures, in JSON.
std::string Pair(const char* key, const Percentiles& figures) {
  return absl::StrFormat("\"%s_us_p50\":%.1f,\"%s_us_p99\":%.1f", key, figures.p50_us, key,
                         figures.p99_us);
}

std::string JsonOf(const CallFigures& figures) {
  return absl::StrFormat(
      "{%s,%s,\"requests_per_second\":%.0f,\"threads_requests_per_second\":%.0f}",
      Pair("round_trip", figures.round_trip), Pair("inline_echo", figures.inline_echo),
      figures.requests_per_second, figures.threads_requests_per_second);
}

std::string JsonOf(const TransportFigures& figures) {
  return absl::StrFormat("{\"stream\":%s,\"unary\":%s,%s,%s}", JsonOf(figures.stream),
                         JsonOf(figures.unary), Pair("one_worker", figures.one_worker),
                         Pair("all_workers", figures.all_workers));
}

void AppendRow(const std::string& what, const Percentiles& on_unix, const Percentiles& on_tcp,
               std::string* table) {
  absl::StrAppendFormat(table, "%-34s %12.1f %12.1f %12.1f %12.1f\n", what, on_unix.p50_us,
                        on_unix.p99_us, on_tcp.p50_us, on_tcp.p99_us);
}

void AppendRates(const char* what, double on_unix, double on_tcp, std::string* table) {
  absl::StrAppendFormat(table, "%-34s %12.0f %12.0f\n", what, on_unix, on_tcp);
}

}  // namespace

std::string FormatRpcJson(const RpcBenchReport& report) {
  const RpcBenchParams& p = report.params;
  return absl::StrFormat(
      "{\"benchmark\":\"rpc\",\"version\":\"%s\",\"grpc\":\"%s\",\"workers\":%d,"
      "\"message_bytes\":%d,\"inline_bytes\":%d,\"request_bytes\":%d,\"concurrency\":%d,"
      "\"iterations\":%d,\"warmup\":%d,\"inline_iterations\":%d,\"requests\":%d,"
      "\"unix\":%s,\"tcp\":%s}",
      EPSERVE_VERSION, report.grpc_version, p.num_workers, p.message_bytes, p.inline_bytes,
      p.request_bytes, p.concurrency, p.iterations, p.warmup, p.inline_iterations, p.requests,
      JsonOf(report.unix_socket), JsonOf(report.tcp));
}

std::string FormatRpcTable(const RpcBenchReport& report) {
  const RpcBenchParams& p = report.params;
  const TransportFigures& on_unix = report.unix_socket;
  const TransportFigures& on_tcp = report.tcp;
  std::string table = absl::StrFormat(
      "rpc: bare gRPC %s, one process a peer, %d iterations (%d of the inline echo)\n\n"
      "%-34s %12s %12s %12s %12s\n",
      report.grpc_version, p.iterations, p.inline_iterations, "us", "unix p50", "unix p99",
      "tcp p50", "tcp p99");
  const std::string small = absl::StrCat(p.message_bytes, " bytes and back, ");
  AppendRow(small + "stream", on_unix.stream.round_trip, on_tcp.stream.round_trip, &table);
  AppendRow(small + "unary", on_unix.unary.round_trip, on_tcp.unary.round_trip, &table);
  AppendRow("to 1 worker and back", on_unix.one_worker, on_tcp.one_worker, &table);
  AppendRow(absl::StrCat("to ", p.num_workers, " workers, last one back"), on_unix.all_workers,
            on_tcp.all_workers, &table);
  const std::string large =
      absl::StrFormat("%.1f MB and back, ", static_cast<double>(p.inline_bytes) / 1e6);
  AppendRow(large + "stream", on_unix.stream.inline_echo, on_tcp.stream.inline_echo, &table);
  AppendRow(large + "unary", on_unix.unary.inline_echo, on_tcp.unary.inline_echo, &table);
  absl::StrAppendFormat(
      &table, "\n%-34s %12s %12s\n",
      absl::StrFormat("requests/s, %d B, %d under way", p.request_bytes, p.concurrency), "unix",
      "tcp");
  AppendRates("stream, one thread", on_unix.stream.requests_per_second,
              on_tcp.stream.requests_per_second, &table);
  AppendRates("stream, a thread each", on_unix.stream.threads_requests_per_second,
              on_tcp.stream.threads_requests_per_second, &table);
  AppendRates("unary, one thread", on_unix.unary.requests_per_second,
              on_tcp.unary.requests_per_second, &table);
  AppendRates("unary, a thread each", on_unix.unary.threads_requests_per_second,
              on_tcp.unary.threads_requests_per_second, &table);
  return table;
}

}  // namespace epserve::microbench
