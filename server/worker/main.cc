// epserve-worker: flags, signals, and the daemon's exit code.
#include <grpc/support/log.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#ifdef EPSERVE_MIMALLOC
#include <mimalloc.h>
#endif

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "runtime/base/log.h"
#include "runtime/engine/engine.h"
#include "server/common/file_limit.h"
#include "server/common/standard_streams.h"
#include "server/worker/clock.h"
#include "server/worker/health_port.h"
#include "server/worker/make_engine.h"
#include "server/worker/memory_report.h"
#include "server/worker/options.h"
#include "server/worker/worker.h"

namespace epserve::worker {
namespace {

constexpr int kUsageExitCode = 2;

int Fail(const absl::Status& status) {
  runtime::LogFailure(status);
  runtime::FlushLog();
  return EXIT_FAILURE;
}

// Takes SIGTERM and SIGINT in a thread of its own; threads that are started later inherit the
// block. The first has the worker leave, the second ends the process. Until there is a worker the
// first does: what is waited for then, a checkpoint on storage that hangs, may never come, and
// nobody knows of this process yet.
class SignalTaker {
 public:
  // Never destroyed: the thread lives as long as the process.
  static SignalTaker& Start() {
    static auto* const taker = new SignalTaker;
    return *taker;
  }

  // `worker` lives from here on until the process ends.
  void SetWorker(Worker* worker) {
    const std::lock_guard lock(mutex_);
    worker_ = worker;
  }

 private:
  SignalTaker() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGTERM);
    sigaddset(&signals_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    std::thread([this] { Take(); }).detach();
  }

  [[noreturn]] void Take() {
    int number = 0;
    sigwait(&signals_, &number);
    if (AskToLeave(number == SIGTERM ? "SIGTERM" : "SIGINT")) sigwait(&signals_, &number);
    _exit(128 + number);
  }

  bool AskToLeave(const char* signal_name) {
    const std::lock_guard lock(mutex_);
    if (worker_ == nullptr) {
      runtime::LogInfo("ended_while_starting", {{"signal", signal_name}});
      return false;
    }
    worker_->RequestLeave(signal_name);
    return true;
  }

  sigset_t signals_;
  std::mutex mutex_;
  Worker* worker_ = nullptr;  // guarded by mutex_
};

WorkerConfig MakeConfig(const Options& options, const runtime::Engine& engine) {
  WorkerConfig config;
  config.coordinator.target = options.coordinator;
  config.coordinator.tls = options.tls;
  config.coordinator.tls_server_name = options.tls_server_name;
  config.coordinator.secret_file = options.secret_file;
  config.coordinator.busy_poll = std::chrono::microseconds(options.busy_poll_us);
  config.worker_id = options.worker_id;
  config.cluster_id = options.cluster_id;
  config.version = EPSERVE_VERSION;
  config.node = options.node;
  config.max_batch_tokens = options.max_batch_tokens;
  config.num_slots = options.num_slots;
  config.peer_timeout = absl::Milliseconds(options.peer_timeout_ms);
  config.leave_timeout = absl::Milliseconds(options.leave_timeout_ms);
  config.now_us = SteadyNowUs;
  config.available_memory = [&engine] { return ReadMemoryFor(engine, "", "/dev/shm"); };
  config.progress_on_terminal = isatty(STDERR_FILENO) == 1;
  return config;
}

// gRPC's own lines would stand on stderr beside ours and wait for whoever reads it; what they tell
// of, our calls' errors do.
void TakeGrpcLog() {
  gpr_set_log_function([](gpr_log_func_args* args) {
    runtime::LogDebug("grpc",
                      {{"file", args->file}, {"line", args->line}, {"text", args->message}});
  });
}

// mimalloc gives freed memory back after 25 ms, and only while its thread frees more, so that each
// thread kept what it had once needed: 3 MB in all. Given back at once it costs a large batch no
// time and one page fault in seventy.
void ReturnFreedMemory() {
#ifdef EPSERVE_MIMALLOC
  mi_option_set(mi_option_decommit_delay, 0);
#endif
}

int Main(int argc, char** argv) {
  // Debian's Abseil comes with its check for lock cycles on, which takes one lock of the whole
  // process at every lock of gRPC.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  ReturnFreedMemory();
  if (const absl::Status guarded = server::GuardStandardStreams(); !guarded.ok()) {
    return Fail(guarded);
  }
  absl::StatusOr<ParsedOptions> parsed = ParseOptions(argc, argv);
  if (!parsed.ok()) {
    std::fprintf(stderr, "epserve-worker: %s\n", std::string(parsed.status().message()).c_str());
    return kUsageExitCode;
  }
  if (!parsed->options) {
    return std::fputs(parsed->text.c_str(), stdout) >= 0 && std::fflush(stdout) == 0 ? EXIT_SUCCESS
                                                                                     : EXIT_FAILURE;
  }
  const Options& options = *parsed->options;
  const absl::Status log =
      runtime::InitLog("epserve-worker", options.log_level, options.log_format);
  if (!log.ok()) return Fail(log);
  TakeGrpcLog();
  SignalTaker& signals = SignalTaker::Start();
  // A checkpoint may have more shards than a process may have files open by default.
  const absl::StatusOr<std::uint64_t> file_limit = server::RaiseFileLimit();
  if (!file_limit.ok()) return Fail(file_limit.status());
  if (!options.secret_file.empty()) {  // Read for each stream; a bad one is told of at once.
    const absl::StatusOr<std::string> secret = server::ReadSecret(options.secret_file);
    if (!secret.ok()) return Fail(secret.status());
  }

  absl::StatusOr<std::unique_ptr<runtime::Engine>> engine = MakeEngine(options);
  if (!engine.ok()) return Fail(engine.status());

  WorkerConfig config = MakeConfig(options, **engine);
  std::unique_ptr<HealthPort> health;
  if (!options.health_listen.empty()) {
    absl::StatusOr<std::unique_ptr<HealthPort>> listening =
        HealthPort::Listen(options.health_listen);
    if (!listening.ok()) return Fail(listening.status());
    health = *std::move(listening);
    config.on_ready = [raw = health.get()](bool ready) { raw->SetReady(ready); };
  }
  Worker worker(std::move(config), *std::move(engine));
  signals.SetWorker(&worker);
  const absl::Status status = worker.Run();
  int code = EXIT_SUCCESS;
  if (!status.ok()) code = Fail(status);
  // Without destructors: a load that is under way would be waited for, and the signals' thread
  // still refers to the worker. Run has released what outlives a process.
  runtime::FlushLog();
  std::_Exit(code);
}

}  // namespace
}  // namespace epserve::worker

int main(int argc, char** argv) { return epserve::worker::Main(argc, argv); }
