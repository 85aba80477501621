// The `epserve` command.
#include <unistd.h>

#include <cstdio>
#include <string>
#include <string_view>
#include <variant>

#ifdef EPSERVE_MIMALLOC
#include <mimalloc.h>
#endif

#include "absl/synchronization/mutex.h"
#include "client/command/bench.h"
#include "client/command/child_process.h"
#include "client/command/drain.h"
#include "client/command/format.h"
#include "client/command/health.h"
#include "client/command/infer.h"
#include "client/command/make_checkpoint.h"
#include "client/command/options.h"
#include "client/command/output_queue.h"
#include "client/command/spare_cores.h"
#include "client/command/status.h"
#include "client/command/terminal.h"
#include "client/command/up.h"
#include "client/command/verify.h"

namespace epserve::client {
namespace {

struct Runner {
  absl::Status operator()(const UpOptions& options) { return RunUp(options); }
  absl::Status operator()(const InferOptions& options) { return RunInfer(options); }
  absl::Status operator()(const VerifyOptions& options) { return RunVerify(options); }
  absl::Status operator()(const BenchOptions& options) { return RunBench(options); }
  absl::Status operator()(const StatusOptions& options) { return RunStatus(options); }
  absl::Status operator()(const HealthOptions& options) { return RunHealth(options); }
  absl::Status operator()(const DrainOptions& options) { return RunDrain(options); }
  absl::Status operator()(const MakeCheckpointOptions& options) {
    return RunMakeCheckpoint(options);
  }
};

// As the coordinator: mimalloc gives memory back to the system 25 ms after it was freed, and gRPC,
// which frees a reply before the next one comes, had each large one's made anew page by page: 4,400
// page faults and up to 20 ms of a 58 MB reply.
void KeepFreedMemory() {
#ifdef EPSERVE_MIMALLOC
  constexpr long kKeepMs = 1000;
  mi_option_set(mi_option_decommit_delay, kKeepMs);
  mi_option_set(mi_option_segment_decommit_delay, kKeepMs);
#endif
}

// Waits for whoever reads stderr, but not for ever.
constexpr absl::Duration kFailPatience = absl::Seconds(2);

int Fail(const std::string& name, const absl::Status& status, int code, bool json = false) {
  const std::string text = name.empty() ? "epserve: " : "epserve " + name + ": ";
  std::string message(status.message());
  if (message.find("failed to connect") != std::string::npos) {
    message += "; start the service with epserve up, or say where it is with --server";
  }
  const std::string line = absl::StatusCodeToString(status.code()) + ": " + Printable(message);
  OutputQueue errors(STDERR_FILENO, [](std::int64_t) { return std::string(); });
  errors.Add(
      (json ? JsonLogLine("ERROR", line) : Terminal::Of(stderr).Paint(Color::kRed, text + line)) +
      "\n");
  errors.Drain(kFailPatience);
  return code;
}

int Main(int argc, char** argv) {
  // Debian's Abseil comes with its check for lock cycles on, which takes one lock of the whole
  // process at every lock of gRPC.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  KeepFreedMemory();
  if (argc > 1 && std::string_view(argv[1]) == kRunChildName) return RunChild(argc, argv);
  const auto parsed = ParseCommand(argc, argv, AvailableCores());
  if (!parsed.ok()) return Fail("", parsed.status(), 2);
  if (!parsed->command) {
    std::fputs(parsed->text.c_str(), stdout);
    return std::fflush(stdout) == 0 ? 0 : 1;
  }
  const absl::Status status = std::visit(Runner(), *parsed->command);
  if (!status.ok()) {
    const auto* const up = std::get_if<UpOptions>(&*parsed->command);
    return Fail(parsed->name, status, 1, up != nullptr && up->json_logs);
  }
  // Output that did not arrive is not success.
  return std::fflush(stdout) == 0 && std::ferror(stdout) == 0 ? 0 : 1;
}

}  // namespace
}  // namespace epserve::client

int main(int argc, char** argv) { return epserve::client::Main(argc, argv); }
