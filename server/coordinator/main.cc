// epserve-coordinator: reads its options and the checkpoint's headers, serves until SIGTERM or
// SIGINT, drains, exits 0. A second signal ends it at once. Once gRPC has lost a listening socket
// it drains too and exits 1, so that whoever runs it starts one that can be reached.
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#ifdef EPSERVE_MIMALLOC
#include <mimalloc.h>
#endif

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/base/unique_fd.h"
#include "runtime/checkpoint/checkpoint.h"
#include "server/common/file_limit.h"
#include "server/common/standard_streams.h"
#include "server/coordinator/coordinator.h"
#include "server/coordinator/grpc_log.h"
#include "server/coordinator/options.h"

namespace epserve::coordinator {
namespace {

constexpr int kUsageExitCode = 2;

// mimalloc gives memory back to the system 25 ms after it was freed, which is less than a large
// request takes: each found the place of its message gone, and had it made anew page by page (5,500
// page faults and 7 ms of a 58 MB message). Kept for a second it serves the next one.
void KeepFreedMemory() {
#ifdef EPSERVE_MIMALLOC
  constexpr long kKeepMs = 1000;
  mi_option_set(mi_option_decommit_delay, kKeepMs);
  mi_option_set(mi_option_segment_decommit_delay, kKeepMs);
#endif
}

// The port as one line; renamed into place, so that a reader never sees half of it.
absl::Status WritePortFile(const std::string& path, int port) {
  if (path.empty()) return absl::OkStatus();
  struct stat info {};
  if (::lstat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("port file: ", path,
                     " is there and is no regular file; it would be replaced: name another"));
  }
  const std::string temporary = absl::StrCat(path, ".tmp.", ::getpid());
  std::FILE* file = std::fopen(temporary.c_str(), "w");
  bool written = file != nullptr && std::fprintf(file, "%d\n", port) > 0;
  if (file != nullptr) written = std::fclose(file) == 0 && written;
  if (!written || std::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    ::unlink(temporary.c_str());
    return absl::UnavailableError(
        absl::StrCat("port file: ", path, " cannot be written (", why, "); give a writable path"));
  }
  return absl::OkStatus();
}

int FirstTcpPort(const std::vector<int>& ports) {
  for (int port : ports) {
    if (port != 0) return port;
  }
  return 0;
}

// SIGTERM and SIGINT as a descriptor; blocked in this thread and in every thread it starts.
runtime::UniqueFd BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return runtime::UniqueFd(::signalfd(-1, &signals, SFD_CLOEXEC));
}

void UnblockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

void Wake(int event_fd) {
  const std::uint64_t one = 1;
  if (::write(event_fd, &one, sizeof(one)) != sizeof(one)) runtime::LogError("wake_lost");
}

// Drains at the first signal, or once nobody can connect any more, which `listener_lost` receives.
// Returns whether the drain ended before a second signal.
bool ServeUntilDrained(Coordinator& coordinator, int signal_fd, int drained_fd, int lost_fd,
                       bool* listener_lost) {
  bool draining = false;
  for (;;) {
    // A descriptor below 0 is passed over.
    pollfd fds[3] = {{signal_fd, POLLIN, 0},
                     {drained_fd, POLLIN, 0},
                     {*listener_lost ? -1 : lost_fd, POLLIN, 0}};
    if (::poll(fds, 3, -1) < 0) {
      if (errno == EINTR) continue;
      runtime::LogError("poll_failed", {{"error", std::strerror(errno)}});
      return false;
    }
    if (fds[2].revents != 0) {
      *listener_lost = true;
      if (!std::exchange(draining, true)) coordinator.Drain();
    }
    if (fds[0].revents != 0) {
      signalfd_siginfo info;
      if (::read(signal_fd, &info, sizeof(info)) != sizeof(info)) continue;
      if (draining) {
        runtime::LogError("second_signal", {{"signal", info.ssi_signo}});
        return false;
      }
      runtime::LogInfo("draining", {{"signal", info.ssi_signo}});
      draining = true;
      coordinator.Drain();
    }
    if (fds[1].revents != 0) return true;
  }
}

absl::Status Serve(const Options& options) {
  EPS_RETURN_IF_ERROR(
      runtime::InitLog("epserve-coordinator", options.log_level, options.log_format));
  EPS_ASSIGN_OR_RETURN(const std::uint64_t file_limit, server::RaiseFileLimit());
  EPS_ASSIGN_OR_RETURN(const runtime::ModelInfo model,
                       runtime::ReadModelInfo(options.checkpoint_dir));
  const runtime::UniqueFd signal_fd = BlockSignals();
  const runtime::UniqueFd drained_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  const runtime::UniqueFd lost_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!signal_fd.valid() || !drained_fd.valid() || !lost_fd.valid()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("start: no file descriptor (", std::strerror(errno), ")"));
  }
  const auto on_drained = [fd = drained_fd.get()] { Wake(fd); };
  SetOnListenerLost([fd = lost_fd.get()] { Wake(fd); });
  EPS_ASSIGN_OR_RETURN(std::unique_ptr<Coordinator> coordinator,
                       Coordinator::Create(options, model, on_drained, {}));
  const int port = FirstTcpPort(coordinator->ports());
  runtime::LogInfo("listening", {{"grpc", absl::StrJoin(options.listen, ",")},
                                 {"port", port},
                                 {"metrics_port", coordinator->metrics_port()},
                                 {"model", options.model_name},
                                 {"architecture", model.architecture},
                                 {"experts", model.num_experts},
                                 {"workers", options.num_workers},
                                 {"version", EPSERVE_VERSION}});
  EPS_RETURN_IF_ERROR(WritePortFile(options.port_file, port));
  EPS_RETURN_IF_ERROR(WritePortFile(options.metrics_port_file, coordinator->metrics_port()));
  bool listener_lost = false;
  if (!ServeUntilDrained(*coordinator, signal_fd.get(), drained_fd.get(), lost_fd.get(),
                         &listener_lost)) {
    runtime::FlushLog();
    ::_exit(1);  // At once: a second signal, or no way to wait for one.
  }
  UnblockSignals();  // From here a signal kills.
  coordinator->Stop();
  SetOnListenerLost(nullptr);
  runtime::LogInfo("stopped");
  if (listener_lost) {
    return absl::ResourceExhaustedError(
        absl::StrCat("listen: nobody could connect any more, probably for want of file "
                     "descriptors (at most ",
                     file_limit, "); raise the hard limit (ulimit -Hn) and start again"));
  }
  return absl::OkStatus();
}

int Fail(const absl::Status& status) {
  runtime::LogFailure(status);
  runtime::FlushLog();
  return 1;
}

int Main(int argc, const char* const* argv) {
  // Debian's Abseil comes with its check for lock cycles on, which takes one lock of the whole
  // process at every lock of gRPC.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  KeepFreedMemory();
  if (const absl::Status guarded = server::GuardStandardStreams(); !guarded.ok()) {
    return Fail(guarded);
  }
  const absl::StatusOr<ParsedOptions> parsed = ParseOptions(argc, argv);
  if (!parsed.ok()) {
    std::fprintf(stderr, "epserve-coordinator: %s\n",
                 std::string(parsed.status().message()).c_str());
    return kUsageExitCode;
  }
  if (!parsed->options.has_value()) {
    return std::fputs(parsed->text.c_str(), stdout) >= 0 && std::fflush(stdout) == 0 ? 0 : 1;
  }
  const absl::Status served = Serve(*parsed->options);
  if (!served.ok()) return Fail(served);
  runtime::FlushLog();
  return 0;
}

}  // namespace
}  // namespace epserve::coordinator

int main(int argc, char** argv) { return epserve::coordinator::Main(argc, argv); }
