#include "client/command/up.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/command/child_process.h"
#include "client/command/format.h"
#include "client/command/progress.h"
#include "client/command/readiness_watch.h"
#include "client/command/scratch_directory.h"
#include "client/command/supervisor.h"
#include "client/command/terminal.h"
#include "client/cpp/output_file.h"
#include "client/cpp/status.h"

namespace epserve::client {

namespace {

constexpr char kCoordinator[] = "coordinator";
constexpr absl::Duration kPollInterval = absl::Milliseconds(50);
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(200);
constexpr absl::Duration kMaxBackoff = absl::Seconds(10);
constexpr absl::Duration kReadyFileInterval = absl::Seconds(1);  // between attempts to write it
// A child that has run for so long starts its backoff anew.
constexpr absl::Duration kStableLifetime = absl::Seconds(30);
// What a drained process may take beyond its drain before it is killed.
constexpr absl::Duration kStopGrace = absl::Seconds(3);
constexpr absl::Duration kWorkerStopTimeout = absl::Seconds(8);

// The port that a child wrote there once it was bound; 0 stands for a Unix socket.
std::optional<int> ReadPort(const std::string& path, int least = 1) {
  std::ifstream file(path);
  std::string line;
  int port = 0;
  if (!std::getline(file, line) || !absl::SimpleAtoi(line, &port) || port < least)
    return std::nullopt;
  return port;
}

struct Restart {
  absl::Time at = absl::InfiniteFuture();
  absl::Duration backoff = kFirstBackoff;
};

// The whole of one `up`, from start to stop.
class Session {
 public:
  Session(const UpOptions& options, std::string program_dir)
      : options_(options),
        program_dir_(std::move(program_dir)),
        out_(Terminal::Of(stdout)),
        listen_(options.listen),
        metrics_listen_(options.metrics_listen) {}

  absl::Status Run();

 private:
  static std::string WorkerName(int index) { return absl::StrCat("worker-", index); }

  std::vector<std::string> CoordinatorArgv() const;
  std::vector<std::string> WorkerArgv(int index) const;
  absl::Status StartChild(const std::string& name);
  absl::Status StartCoordinator();
  absl::Status WaitUntilReady();
  absl::Status Serve();
  void HandleExit(const ChildExit& exit);
  void TellLastLines(const ChildExit& exit);
  void RestartDue();
  void ScheduleRestart(Restart& restart);
  void UpdateReadyFile();
  void ReportReadiness();
  absl::Status Stop();
  void StopOne(const std::vector<std::string>& names, absl::Duration patience);
  absl::Status FailedBeforeReady(const ChildExit& exit);
  void ShowProgress();
  void PrintEndpoints(absl::Duration took);
  absl::Status WriteReadyFile() const;
  void Say(Color color, const std::string& text);
  std::string Line(Color color, const std::string& text) const;  // in the logs' form
  // Polls once; takes note of a wish to stop.
  std::vector<ChildExit> Poll();

  const UpOptions& options_;
  const std::string program_dir_;
  const Terminal out_;
  std::string listen_;
  std::string metrics_listen_;
  std::string address_;          // Where clients reach the coordinator; empty until bound.
  std::string metrics_address_;  // Empty: none.

  std::unique_ptr<ScratchDirectory> scratch_;
  std::unique_ptr<Supervisor> supervisor_;
  std::unique_ptr<Progress> progress_;
  std::unique_ptr<ReadinessWatch> watch_;
  std::map<std::string, Restart> restarts_;
  absl::Time ready_file_due_ = absl::InfiniteFuture();
  bool ready_file_failed_ = false;  // as it was told
  std::string told_failure_;        // why the last epoch ended, as it was told while starting
  int stop_requests_ = 0;
  bool was_ready_ = true;
  absl::Time unready_since_;
  const absl::Time started_ = absl::Now();
};

std::vector<std::string> Session::CoordinatorArgv() const {
  std::vector<std::string> argv = {program_dir_ + "/epserve-coordinator",
                                   "--checkpoint=" + options_.checkpoint_dir,
                                   absl::StrCat("--workers=", options_.num_workers),
                                   "--listen=" + listen_,
                                   "--metrics-listen=" + metrics_listen_,
                                   "--port-file=" + scratch_->File("port"),
                                   "--metrics-port-file=" + scratch_->File("metrics_port")};
  argv.insert(argv.end(), options_.coordinator_args.begin(), options_.coordinator_args.end());
  return argv;
}

std::vector<std::string> Session::WorkerArgv(int index) const {
  std::vector<std::string> argv = {program_dir_ + "/epserve-worker", "--coordinator=" + address_,
                                   "--checkpoint=" + options_.checkpoint_dir,
                                   "--worker-id=" + WorkerName(index),
                                   absl::StrCat("--local-rank=", index)};
  argv.insert(argv.end(), options_.worker_args.begin(), options_.worker_args.end());
  return argv;
}

absl::Status Session::StartChild(const std::string& name) {
  if (name == kCoordinator) return supervisor_->Start(name, CoordinatorArgv());
  for (int index = 0; index < options_.num_workers; ++index) {
    if (name == WorkerName(index)) return supervisor_->Start(name, WorkerArgv(index));
  }
  return absl::InternalError("start: no child is named " + name);
}

std::vector<ChildExit> Session::Poll() {
  SupervisorEvents events = supervisor_->Poll(kPollInterval);
  if (events.stop_requested) ++stop_requests_;
  return std::move(events.exits);
}

void Session::Say(Color color, const std::string& text) {
  if (progress_ != nullptr) progress_->Hide();
  supervisor_->Print(Line(color, text));
}

std::string Session::Line(Color color, const std::string& text) const {
  if (!options_.json_logs) {
    return Terminal::Of(stderr).Paint(color, "epserve up: " + text) + "\n";
  }
  const char* const level = color == Color::kRed      ? "ERROR"
                            : color == Color::kYellow ? "WARNING"
                                                      : "INFO";
  return JsonLogLine(level, text) + "\n";
}

absl::Status Session::FailedBeforeReady(const ChildExit& exit) {
  progress_->Hide();
  std::string message =
      absl::StrCat(exit.name, " ", exit.description, " before the service was ready");
  const auto lines = supervisor_->LastLines(exit.name);
  if (!lines.empty()) absl::StrAppend(&message, "; its last line: ", lines.back());
  if (!options_.log_dir.empty()) {
    absl::StrAppend(&message, "; its log: ", supervisor_->LogPath(exit.name));
  }
  return absl::FailedPreconditionError(message);
}

// Until the coordinator has bound its port, which the workers need to know.
absl::Status Session::StartCoordinator() {
  EPC_RETURN_IF_ERROR(StartChild(kCoordinator));
  const bool unix_socket = absl::StartsWith(listen_, "unix:");
  const bool metrics = metrics_listen_ != "off";
  while (stop_requests_ == 0) {
    const auto port = ReadPort(scratch_->File("port"), unix_socket ? 0 : 1);
    const auto metrics_port =
        metrics ? ReadPort(scratch_->File("metrics_port")) : std::optional<int>(1);
    if (port && metrics_port) {
      address_ = ReachableAddress(listen_, *port);
      // A restarted coordinator must come back where its workers and clients look for it.
      listen_ = WithPort(listen_, *port);
      if (metrics) {
        metrics_address_ = ReachableAddress(metrics_listen_, *metrics_port);
        metrics_listen_ = WithPort(metrics_listen_, *metrics_port);
      }
      return absl::OkStatus();
    }
    for (const ChildExit& exit : Poll()) return FailedBeforeReady(exit);
    ShowProgress();
  }
  return absl::OkStatus();
}

void Session::ShowProgress() {
  const ReadinessSnapshot latest = watch_ != nullptr ? watch_->Latest() : ReadinessSnapshot();
  if (!latest.cluster) {
    progress_->Update(0, "starting the coordinator");
    return;
  }
  double loaded = 0;
  std::uint64_t bytes = 0;
  for (const WorkerState& worker : latest.cluster->workers) {
    loaded += worker.rank >= 0 ? worker.load_fraction : 0;
    bytes += worker.weight_bytes;
  }
  std::string detail = absl::StrCat(latest.cluster->workers.size(), " of ", options_.num_workers,
                                    " workers joined, ", Printable(latest.cluster->state));
  if (bytes > 0) absl::StrAppend(&detail, ", ", FormatBytes(bytes), " of weights");
  const std::string& failure = latest.cluster->last_epoch_end;
  if (!failure.empty() && failure != told_failure_) {
    Say(Color::kYellow, "not ready: " + Printable(failure));
  }
  told_failure_ = failure;
  progress_->Update(loaded / options_.num_workers, detail);
}

absl::Status Session::WaitUntilReady() {
  watch_ = std::make_unique<ReadinessWatch>(address_, options_.security);
  while (stop_requests_ == 0) {
    for (const ChildExit& exit : Poll()) return FailedBeforeReady(exit);
    if (watch_->Latest().ready && watch_->Latest().cluster) return absl::OkStatus();
    if (options_.ready_timeout_s > 0 &&
        absl::Now() - started_ > absl::Seconds(options_.ready_timeout_s)) {
      return absl::DeadlineExceededError(
          absl::StrCat("the service was not ready within ", options_.ready_timeout_s, " s"));
    }
    ShowProgress();
  }
  return absl::OkStatus();
}

void Session::PrintEndpoints(absl::Duration took) {
  progress_->Hide();
  const ClusterState cluster = *watch_->Latest().cluster;
  std::uint64_t weights = 0;
  for (const WorkerState& worker : cluster.workers) weights += worker.weight_bytes;
  std::string text = out_.Paint(Color::kBold, "epserve " EPSERVE_VERSION) + "\n";
  const auto line = [&](const char* name, const std::string& value) {
    absl::StrAppendFormat(&text, "  %-9s %s\n", name, value);
  };
  line("model",
       absl::StrCat(Printable(cluster.model), ", ", cluster.num_experts, " experts a layer"));
  line("workers", absl::StrCat(cluster.workers.size(), " of ", cluster.expected_workers, ", ",
                               FormatBytes(weights), " of weights"));
  line("gRPC", address_);
  if (!metrics_address_.empty()) {
    const char* const scheme = options_.metrics_tls ? "https://" : "http://";
    line("metrics", scheme + metrics_address_ + "/metrics");
  }
  absl::StrAppendFormat(&text, "%s in %s\n", out_.Paint(Color::kGreen, "ready"),
                        FormatSeconds(absl::ToDoubleSeconds(took)));
  supervisor_->PrintToStdout(text);
}

absl::Status Session::WriteReadyFile() const {
  if (options_.ready_file.empty()) return absl::OkStatus();
  std::string text =
      absl::StrCat("grpc=", address_, "\nmetrics=", metrics_address_, "\nup_pid=", getpid(),
                   "\ncoordinator_pid=", supervisor_->PidOf(kCoordinator), "\n");
  for (int index = 0; index < options_.num_workers; ++index) {
    absl::StrAppend(&text, "worker_", index, "_pid=", supervisor_->PidOf(WorkerName(index)), "\n");
  }
  EPC_ASSIGN_OR_RETURN(const auto file, OutputFile::Create(options_.ready_file));
  EPC_RETURN_IF_ERROR(file->Write(text.data(), text.size()));
  return file->Finish();
}

// With --log-dir nobody has seen what the child wrote.
void Session::TellLastLines(const ChildExit& exit) {
  if (exit.clean || options_.log_dir.empty()) return;
  Say(Color::kPlain, absl::StrCat("the last lines of ", supervisor_->LogPath(exit.name), ":"));
  for (const std::string& line : supervisor_->LastLines(exit.name)) {
    Say(Color::kDim, absl::StrCat(exit.name, " │ ", line));
  }
}

void Session::HandleExit(const ChildExit& exit) {
  const std::string what = absl::StrCat(exit.name, " ", exit.description);
  TellLastLines(exit);
  if (exit.clean && exit.name != kCoordinator) {
    Say(Color::kYellow, what + "; it left on purpose and is not restarted");
    return;
  }
  if (!options_.restart) {
    Say(Color::kRed, what + "; not restarted (--no-restart)");
    return;
  }
  Restart& restart = restarts_[exit.name];
  if (exit.lifetime > kStableLifetime) restart.backoff = kFirstBackoff;
  Say(Color::kYellow,
      absl::StrCat(what, "; restarting in ", absl::FormatDuration(restart.backoff)));
  ScheduleRestart(restart);
}

void Session::ScheduleRestart(Restart& restart) {
  restart.at = absl::Now() + restart.backoff;
  restart.backoff = std::min(restart.backoff * 2, kMaxBackoff);
}

void Session::RestartDue() {
  for (auto& [name, restart] : restarts_) {
    if (absl::Now() < restart.at) continue;
    restart.at = absl::InfiniteFuture();
    if (const absl::Status status = StartChild(name); !status.ok()) {
      Say(Color::kRed, std::string(status.message()));
      ScheduleRestart(restart);
    } else {
      ready_file_due_ = absl::Now();  // It has the children's process ids.
    }
  }
}

// Apart from the restarts: children run whether or not their ids can be written down.
void Session::UpdateReadyFile() {
  if (absl::Now() < ready_file_due_) return;
  const absl::Status status = WriteReadyFile();
  ready_file_due_ = status.ok() ? absl::InfiniteFuture() : absl::Now() + kReadyFileInterval;
  if (status.ok() != ready_file_failed_) return;
  ready_file_failed_ = !status.ok();
  if (status.ok()) return Say(Color::kGreen, "--ready-file: up to date again");
  Say(Color::kRed, absl::StrCat("--ready-file: ", status.message(),
                                "; its process ids are old until it can be written"));
}

void Session::ReportReadiness() {
  const ReadinessSnapshot latest = watch_->Latest();
  if (latest.ready == was_ready_) return;
  was_ready_ = latest.ready;
  if (latest.ready) {
    Say(Color::kGreen,
        absl::StrCat("ready again after ",
                     FormatSeconds(absl::ToDoubleSeconds(absl::Now() - unready_since_))));
    return;
  }
  unready_since_ = absl::Now();
  if (!latest.cluster) return Say(Color::kYellow, "not ready: the coordinator does not answer");
  std::string text =
      absl::StrCat("not ready: ", latest.cluster->workers.size(), " of ",
                   latest.cluster->expected_workers, " workers joined, ",
                   latest.cluster->experts_without_worker, " experts without a live worker");
  if (!latest.cluster->last_epoch_end.empty()) {
    absl::StrAppend(&text, "; ", Printable(latest.cluster->last_epoch_end));
  }
  Say(Color::kYellow, text);
}

absl::Status Session::Serve() {
  while (stop_requests_ == 0) {
    for (const ChildExit& exit : Poll()) HandleExit(exit);
    RestartDue();
    UpdateReadyFile();
    ReportReadiness();
    const bool any_due = std::any_of(restarts_.begin(), restarts_.end(), [](const auto& item) {
      return item.second.at != absl::InfiniteFuture();
    });
    if (!supervisor_->AnyRunning() && !any_due) {
      return absl::UnavailableError("every child has ended and none is to be restarted");
    }
  }
  return absl::OkStatus();
}

void Session::StopOne(const std::vector<std::string>& names, absl::Duration patience) {
  const auto any_running = [&] {
    return std::any_of(names.begin(), names.end(),
                       [&](const std::string& name) { return supervisor_->IsRunning(name); });
  };
  for (const std::string& name : names) supervisor_->Signal(name, SIGTERM);
  const absl::Time kill_at = absl::Now() + patience;
  bool killed = false;
  while (any_running()) {
    for (const ChildExit& exit : Poll()) {
      if (!exit.clean && !killed)
        Say(Color::kYellow, absl::StrCat(exit.name, " ", exit.description));
    }
    // Whoever asks twice does not want to wait.
    if (!killed && (absl::Now() > kill_at || stop_requests_ > 1)) {
      killed = true;
      for (const std::string& name : names) {
        if (!supervisor_->IsRunning(name)) continue;
        Say(Color::kYellow, name + " has not stopped; killing it");
        supervisor_->Signal(name, SIGKILL);
      }
    }
  }
}

// The coordinator first: it answers what is under way, for which it needs the workers.
absl::Status Session::Stop() {
  if (supervisor_->AnyRunning()) Say(Color::kDim, "stopping");
  StopOne({kCoordinator}, absl::Milliseconds(options_.drain_timeout_ms) + kStopGrace);
  std::vector<std::string> workers;
  for (int index = 0; index < options_.num_workers; ++index) workers.push_back(WorkerName(index));
  StopOne(workers, kWorkerStopTimeout);
  watch_.reset();  // Not before: it may be waiting for a coordinator that hangs.
  if (!options_.ready_file.empty()) unlink(options_.ready_file.c_str());
  return absl::OkStatus();
}

absl::Status Session::Run() {
  EPC_ASSIGN_OR_RETURN(scratch_, ScratchDirectory::Create());
  progress_ = std::make_unique<Progress>("starting", [this](const std::string& text) {
    if (!options_.json_logs) supervisor_->Print(text);
  });
  Supervisor::Config config;
  config.log_dir = options_.log_dir;
  config.raw_lines = options_.json_logs;
  config.before_print = [this] { progress_->Hide(); };
  config.dropped_note = [this](std::int64_t count) {
    return Line(Color::kYellow, absl::StrCat(count,
                                             " pieces of output were dropped, because "
                                             "nobody read them"));
  };
  EPC_ASSIGN_OR_RETURN(supervisor_, Supervisor::Create(std::move(config)));

  absl::Status status = StartCoordinator();
  for (int index = 0; status.ok() && stop_requests_ == 0 && index < options_.num_workers; ++index) {
    status = StartChild(WorkerName(index));
  }
  if (status.ok() && stop_requests_ == 0) status = WaitUntilReady();
  if (status.ok() && stop_requests_ == 0) {
    PrintEndpoints(absl::Now() - started_);
    status = WriteReadyFile();
    if (status.ok()) status = Serve();
  }
  EPC_RETURN_IF_ERROR(Stop());
  supervisor_->DrainOutput();
  return status;
}

// Says now what would else be found out only when everything runs.
absl::Status CheckReadyFile(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  struct stat info {};
  if (lstat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ready-file '", path,
                     "': is there and is no regular file; it would be "
                     "replaced and removed: name another"));
  }
  if (const auto file = OutputFile::Create(path); !file.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ready-file '", path, "': ", file.status().message(),
                     "; name a file in a directory that exists and can be written"));
  }
  unlink(path.c_str());  // What an earlier service left says nothing of this one.
  return absl::OkStatus();
}

absl::Status CheckProgram(const std::string& path) {
  if (access(path.c_str(), X_OK) == 0) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("program '", path, "': ", strerror(errno),
                                          "; build it, or say where it is with --program-dir"));
}

}  // namespace

std::string WithPort(const std::string& listen, int port) {
  if (absl::StartsWith(listen, "unix:")) return listen;
  return absl::StrCat(listen.substr(0, listen.rfind(':')), ":", port);
}

std::string ReachableAddress(const std::string& listen, int port) {
  const std::string bound = WithPort(listen, port);
  if (absl::StartsWith(bound, "0.0.0.0:")) return absl::StrCat("127.0.0.1:", port);
  if (absl::StartsWith(bound, "[::]:")) return absl::StrCat("[::1]:", port);
  return bound;
}

absl::Status RunUp(const UpOptions& options) {
  std::string program_dir = options.program_dir;
  if (program_dir.empty()) {
    EPC_ASSIGN_OR_RETURN(const std::string self, OwnProgramPath());
    program_dir = self.substr(0, self.rfind('/'));
  }
  EPC_RETURN_IF_ERROR(CheckProgram(program_dir + "/epserve-coordinator"));
  EPC_RETURN_IF_ERROR(CheckProgram(program_dir + "/epserve-worker"));
  EPC_RETURN_IF_ERROR(CheckReadyFile(options.ready_file));
  return Session(options, program_dir).Run();
}

}  // namespace epserve::client
