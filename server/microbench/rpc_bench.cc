#include "server/microbench/rpc_bench.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "runtime/base/unique_fd.h"
#include "runtime/microbench/memory_check.h"
#include "server/microbench/child_process.h"
#include "server/microbench/echo_client.h"
#include "server/microbench/echo_peer.h"
#include "server/microbench/fan_out.h"

namespace epserve::microbench {
namespace {

constexpr int kStartTimeoutMs = 10'000;

// A folder for sockets, removed with it.
class SocketFolder {
 public:
  static absl::StatusOr<SocketFolder> Create() {
    std::error_code error;
    std::string path = std::filesystem::temp_directory_path(error) / "epserve-rpc-XXXXXX";
    if (error || ::mkdtemp(path.data()) == nullptr) {
      return absl::InternalError(absl::StrCat("rpc: folder ", path, " cannot be made (",
                                              std::strerror(errno), "); set TMPDIR"));
    }
    return SocketFolder(std::move(path));
  }
  ~SocketFolder() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  SocketFolder(SocketFolder&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  SocketFolder& operator=(SocketFolder&&) = delete;

  std::string Socket(const std::string& name) const { return absl::StrCat(path_, "/", name); }

 private:
  explicit SocketFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

absl::StatusOr<int> ReadPort(int fd) {
  pollfd ready{fd, POLLIN, 0};
  char text[16] = {};
  int port = 0;
  if (::poll(&ready, 1, kStartTimeoutMs) == 1 && ::read(fd, text, sizeof(text) - 1) > 0 &&
      absl::SimpleAtoi(text, &port)) {
    return port;
  }
  return absl::UnavailableError("rpc: the echo server has not started");
}

absl::StatusOr<CallFigures> MeasureCalls(const std::string& target, CallKind kind,
                                         const RpcBenchParams& p) {
  CallFigures figures;
  EPS_ASSIGN_OR_RETURN(figures.round_trip,
                       MeasureRoundTrips(target, kind, p.message_bytes, p.warmup, p.iterations));
  EPS_ASSIGN_OR_RETURN(figures.inline_echo, MeasureRoundTrips(target, kind, p.inline_bytes,
                                                              /*warmup=*/1, p.inline_iterations));
  EPS_ASSIGN_OR_RETURN(figures.requests_per_second,
                       MeasureThroughput(target, kind, Callers::kOneThread, p.request_bytes,
                                         p.concurrency, p.requests));
  EPS_ASSIGN_OR_RETURN(figures.threads_requests_per_second,
                       MeasureThroughput(target, kind, Callers::kThreads, p.request_bytes,
                                         p.concurrency, p.requests));
  return figures;
}

// `echo` is the echo server's address, `own` one that this process may serve at.
absl::StatusOr<TransportFigures> MeasureTransport(const std::string& echo, const std::string& own,
                                                  const RpcBenchParams& p) {
  TransportFigures figures;
  EPS_ASSIGN_OR_RETURN(figures.stream, MeasureCalls(echo, CallKind::kStream, p));
  EPS_ASSIGN_OR_RETURN(figures.unary, MeasureCalls(echo, CallKind::kUnary, p));
  EPS_ASSIGN_OR_RETURN(figures.one_worker,
                       MeasureFanOut(own, 1, p.message_bytes, p.warmup, p.iterations));
  EPS_ASSIGN_OR_RETURN(figures.all_workers,
                       MeasureFanOut(own, p.num_workers, p.message_bytes, p.warmup, p.iterations));
  return figures;
}

}  // namespace

absl::StatusOr<RpcBenchReport> RunRpcBench(const RpcBenchParams& params) {
  // A message is there up to four times on its way there, and as often on its way back.
  constexpr double kCopies = 8;
  EPS_RETURN_IF_ERROR(runtime::CheckMemoryFor(
      "rpc",
      kCopies * (static_cast<double>(params.inline_bytes) +
                 static_cast<double>(params.request_bytes) * params.concurrency +
                 static_cast<double>(params.message_bytes) * params.num_workers),
      "--inline-bytes, --request-bytes or --concurrency"));
  EPS_ASSIGN_OR_RETURN(const SocketFolder folder, SocketFolder::Create());
  int pipe_fds[2];
  if (::pipe2(pipe_fds, O_CLOEXEC) != 0) {
    return absl::InternalError(absl::StrCat("rpc: no pipe: ", std::strerror(errno)));
  }
  const runtime::UniqueFd port_fd(pipe_fds[0]);
  runtime::UniqueFd child_fd(pipe_fds[1]);
  EPS_ASSIGN_OR_RETURN(
      const ChildProcess echo,
      ChildProcess::Start({"rpc-echo", absl::StrCat("--socket=", folder.Socket("echo"))},
                          child_fd.get()));
  child_fd = runtime::UniqueFd();  // So that the child's end is seen.
  EPS_ASSIGN_OR_RETURN(const int port, ReadPort(port_fd.get()));
  RpcBenchReport report;
  report.params = params;
  report.grpc_version = grpc::Version();
  EPS_ASSIGN_OR_RETURN(
      report.unix_socket,
      MeasureTransport("unix:" + folder.Socket("echo"), "unix:" + folder.Socket("own"), params));
  EPS_ASSIGN_OR_RETURN(report.tcp,
                       MeasureTransport(absl::StrCat("127.0.0.1:", port), "127.0.0.1:0", params));
  return report;
}

}  // namespace epserve::microbench
