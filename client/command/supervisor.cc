#include "client/command/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/command/child_process.h"
#include "client/cpp/status.h"

namespace epserve::client {

namespace {

constexpr std::size_t kLastLines = 5;
// A child that never ends a line must not fill memory.
constexpr std::size_t kMaxLineBytes = 64 << 10;
constexpr std::size_t kNameColumns = 11;
constexpr absl::Duration kDrainPatience = absl::Milliseconds(500);

// A directory that logs can be written to, created where its parent exists.
absl::Status PrepareLogDirectory(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  int error = mkdir(path.c_str(), 0755) == 0 || errno == EEXIST ? 0 : errno;
  struct stat info {};
  if (error == 0 && stat(path.c_str(), &info) != 0) error = errno;
  if (error == 0 && !S_ISDIR(info.st_mode)) error = ENOTDIR;
  if (error == 0 && access(path.c_str(), W_OK | X_OK) != 0) error = errno;
  if (error == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "--log-dir '", path, "': ", strerror(error),
      "; name a directory that can be written, or one to create in a directory that exists"));
}

}  // namespace

Supervisor::Supervisor(Config config)
    : config_(std::move(config)),
      terminal_(Terminal::Of(stderr)),
      errors_(STDERR_FILENO, config_.dropped_note),
      output_(STDOUT_FILENO, config_.dropped_note) {}

void Supervisor::DrainOutput() {
  output_.Drain(kDrainPatience);
  errors_.Drain(kDrainPatience);
}

absl::StatusOr<std::unique_ptr<Supervisor>> Supervisor::Create(Config config) {
  EPC_RETURN_IF_ERROR(PrepareLogDirectory(config.log_dir));
  std::unique_ptr<Supervisor> supervisor(new Supervisor(std::move(config)));
  sigset_t set;
  sigemptyset(&set);
  for (const int signal_number : {SIGCHLD, SIGINT, SIGTERM, SIGHUP}) sigaddset(&set, signal_number);
  signal(SIGPIPE, SIG_IGN);
  if (pthread_sigmask(SIG_BLOCK, &set, nullptr) != 0) {
    return absl::InternalError("supervise: signals could not be blocked");
  }
  supervisor->signals_ = FileHandle(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (supervisor->signals_.get() < 0) {
    return absl::InternalError(absl::StrCat("supervise: signalfd: ", strerror(errno)));
  }
  return supervisor;
}

Supervisor::~Supervisor() {
  for (const auto& [name, child] : children_) kill(child.pid, SIGKILL);
  for (const auto& [name, child] : children_) {
    while (waitpid(child.pid, nullptr, 0) < 0 && errno == EINTR) {
    }
  }
}

std::string Supervisor::LogPath(const std::string& name) const {
  return config_.log_dir + "/" + name + ".log";
}

absl::StatusOr<FileHandle> Supervisor::OpenLog(const std::string& name) const {
  FileHandle file(open(LogPath(name).c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (file.get() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("start ", name, ": log '", LogPath(name), "': ", strerror(errno)));
  }
  return file;
}

absl::Status Supervisor::Start(const std::string& name, const std::vector<std::string>& argv) {
  if (IsRunning(name)) {
    return absl::InternalError(
        absl::StrCat("start ", name, ": process ", PidOf(name), " of that name still runs"));
  }
  Child child;
  child.started = absl::Now();
  FileHandle child_side;
  if (config_.log_dir.empty()) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("start ", name, ": pipe: ", strerror(errno)));
    }
    child.output = FileHandle(ends[0]);
    child_side = FileHandle(ends[1]);
    // The read end alone: the child's own writes must block, not fail, where this end is slow.
    fcntl(child.output.get(), F_SETFL, O_NONBLOCK);
  } else {
    EPC_ASSIGN_OR_RETURN(child_side, OpenLog(name));
  }
  EPC_ASSIGN_OR_RETURN(child.pid, SpawnChild(argv, child_side.get()));
  last_lines_[name].clear();
  children_.emplace(name, std::move(child));
  return absl::OkStatus();
}

SupervisorEvents Supervisor::Poll(absl::Duration timeout) {
  std::vector<pollfd> polled = {{signals_.get(), POLLIN, 0}};
  std::vector<std::string> names;
  for (const auto& [name, child] : children_) {
    if (child.output.get() < 0) continue;
    polled.push_back({child.output.get(), POLLIN, 0});
    names.push_back(name);
  }
  for (const OutputQueue* queue : {&errors_, &output_}) {
    if (!queue->empty()) polled.push_back({queue->fd(), POLLOUT, 0});
  }
  const auto timeout_ms =
      static_cast<int>(std::clamp<std::int64_t>(absl::ToInt64Milliseconds(timeout), 0, 60'000));
  poll(polled.data(), polled.size(), timeout_ms);
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (polled[i + 1].revents != 0) ReadOutput(names[i], children_.at(names[i]));
  }
  errors_.Flush();
  output_.Flush();
  SupervisorEvents events;
  TakeSignals(events);
  Reap(events);
  return events;
}

void Supervisor::ReadOutput(const std::string& name, Child& child) {
  char buffer[16 << 10];
  while (child.output.get() >= 0) {
    const ssize_t got = read(child.output.get(), buffer, sizeof(buffer));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return;  // EAGAIN: nothing more for now.
    if (got == 0) {
      child.output.Close();
      break;
    }
    child.partial.append(buffer, static_cast<std::size_t>(got));
    std::size_t begin = 0;
    for (std::size_t end; (end = child.partial.find('\n', begin)) != std::string::npos;
         begin = end + 1) {
      PrintLine(name, child.partial.substr(begin, end - begin));
    }
    child.partial.erase(0, begin);
    if (child.partial.size() > kMaxLineBytes) PrintLine(name, std::exchange(child.partial, ""));
  }
  if (!child.partial.empty()) PrintLine(name, std::exchange(child.partial, ""));
}

void Supervisor::PrintLine(const std::string& name, const std::string& line) {
  auto& last = last_lines_[name];
  last.push_back(line);
  if (last.size() > kLastLines) last.pop_front();
  if (config_.before_print) config_.before_print();
  if (config_.raw_lines) {
    Print(line + "\n");
    return;
  }
  const std::string padding(name.size() < kNameColumns ? kNameColumns - name.size() : 0, ' ');
  Print(absl::StrCat(terminal_.Paint(Color::kDim, name), padding, " │ ", line, "\n"));
}

void Supervisor::TakeSignals(SupervisorEvents& events) {
  signalfd_siginfo info;
  while (read(signals_.get(), &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
    if (info.ssi_signo != SIGCHLD) events.stop_requested = true;
  }
}

void Supervisor::Reap(SupervisorEvents& events) {
  // Each child by its id: SIGCHLD may stand for several, and a process may have children that are
  // not ours.
  for (auto child = children_.begin(); child != children_.end();) {
    int status = 0;
    if (waitpid(child->second.pid, &status, WNOHANG) != child->second.pid) {
      ++child;
      continue;
    }
    ReadOutput(child->first, child->second);
    if (!child->second.partial.empty()) PrintLine(child->first, child->second.partial);
    events.exits.push_back({child->first, WIFEXITED(status) && WEXITSTATUS(status) == 0,
                            DescribeExit(status), absl::Now() - child->second.started});
    child = children_.erase(child);
  }
}

void Supervisor::Signal(const std::string& name, int signal_number) {
  const auto found = children_.find(name);
  if (found != children_.end()) kill(found->second.pid, signal_number);
}

pid_t Supervisor::PidOf(const std::string& name) const {
  const auto found = children_.find(name);
  return found == children_.end() ? -1 : found->second.pid;
}

std::vector<std::string> Supervisor::LastLines(const std::string& name) const {
  if (config_.log_dir.empty()) {
    const auto found = last_lines_.find(name);
    if (found == last_lines_.end()) return {};
    return {found->second.begin(), found->second.end()};
  }
  std::ifstream log(LogPath(name));
  std::deque<std::string> last;
  for (std::string line; std::getline(log, line);) {
    last.push_back(line);
    if (last.size() > kLastLines) last.pop_front();
  }
  return {last.begin(), last.end()};
}

}  // namespace epserve::client
