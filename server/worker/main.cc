// epserve-worker: flags, signals, and the daemon's exit code.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/engine/engine.h"
#include "server/worker/clock.h"
#include "server/worker/memory_report.h"
#include "server/worker/options.h"
#include "server/worker/worker.h"

namespace epserve::worker {
namespace {

constexpr int kUsageExitCode = 2;

int Complain(const absl::Status& status) {
  std::fprintf(stderr, "epserve-worker: %s\n", std::string(status.message()).c_str());
  return EXIT_FAILURE;
}

// SIGTERM and SIGINT are taken by one thread of their own; every other thread inherits the block.
sigset_t BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  return signals;
}

[[noreturn]] void TakeSignals(const sigset_t& signals, Worker& worker) {
  int number = 0;
  sigwait(&signals, &number);
  worker.RequestLeave(number == SIGTERM ? "SIGTERM" : "SIGINT");
  sigwait(&signals, &number);
  _exit(128 + number);
}

WorkerConfig MakeConfig(const Options& options, std::string secret) {
  WorkerConfig config;
  config.coordinator.target = options.coordinator;
  config.coordinator.tls = options.tls;
  config.coordinator.tls_server_name = options.tls_server_name;
  config.coordinator.secret = std::move(secret);
  config.worker_id = options.worker_id;
  config.cluster_id = options.cluster_id;
  config.version = EPSERVE_VERSION;
  config.node = options.node;
  config.max_batch_tokens = options.max_batch_tokens;
  config.num_slots = options.num_slots;
  config.peer_timeout = absl::Milliseconds(options.peer_timeout_ms);
  config.now_us = SteadyNowUs;
  config.available_memory = [] { return ReadAvailableMemory("", "/dev/shm"); };
  config.progress_on_terminal = isatty(STDERR_FILENO) == 1;
  return config;
}

int Main(int argc, char** argv) {
  absl::StatusOr<ParsedOptions> parsed = ParseOptions(argc, argv);
  if (!parsed.ok()) {
    Complain(parsed.status());
    return kUsageExitCode;
  }
  if (!parsed->options) {
    std::fputs(parsed->text.c_str(), stdout);
    return EXIT_SUCCESS;
  }
  const Options& options = *parsed->options;
  const absl::Status log =
      runtime::InitLog("epserve-worker", options.log_level, options.log_format);
  if (!log.ok()) return Complain(log);
  const sigset_t signals = BlockSignals();
  std::string secret;
  if (!options.secret_file.empty()) {
    absl::StatusOr<std::string> read = server::ReadSecret(options.secret_file);
    if (!read.ok()) return Complain(read.status());
    secret = *std::move(read);
  }

  runtime::EngineOptions engine_options;
  engine_options.checkpoint_dir = options.checkpoint_dir;
  engine_options.cluster_id = options.cluster_id;
  engine_options.max_batch_tokens = options.max_batch_tokens;
  engine_options.num_slots = options.num_slots;
  engine_options.compute_threads = options.compute_threads;
  engine_options.peer_timeout = absl::Milliseconds(options.peer_timeout_ms);
  absl::StatusOr<std::unique_ptr<runtime::Engine>> engine =
      runtime::CreateHostEngine(engine_options);
  if (!engine.ok()) return Complain(engine.status());

  Worker worker(MakeConfig(options, std::move(secret)), *std::move(engine));
  std::thread([&signals, &worker] { TakeSignals(signals, worker); }).detach();
  const absl::Status status = worker.Run();
  int code = EXIT_SUCCESS;
  if (!status.ok()) code = Complain(status);
  // Without destructors: a load that is under way would be waited for, and the signal thread still
  // refers to the worker. Run has released what outlives a process.
  std::fflush(nullptr);
  std::_Exit(code);
}

}  // namespace
}  // namespace epserve::worker

int main(int argc, char** argv) { return epserve::worker::Main(argc, argv); }
