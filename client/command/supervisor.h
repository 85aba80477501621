// Runs a set of child processes: starts them, prints what they write, notices when they end, and
// stops them. It decides nothing: when to restart and in which order to stop is its caller's,
// up.cc.
//
// Thread safety: one thread. Every wait is in Poll. The signals SIGCHLD, SIGINT, SIGTERM and SIGHUP
// are taken over for the life of the process, from Create on; call it before any thread starts.
// Destruction kills what still runs and waits for it.
#ifndef EPSERVE_CLIENT_COMMAND_SUPERVISOR_H_
#define EPSERVE_CLIENT_COMMAND_SUPERVISOR_H_

#include <sys/types.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/command/output_queue.h"
#include "client/command/terminal.h"
#include "client/cpp/file_handle.h"

namespace epserve::client {

struct ChildExit {
  std::string name;
  bool clean = false;       // Exit code 0.
  std::string description;  // "exited with code 1"
  absl::Duration lifetime;
};

struct SupervisorEvents {
  bool stop_requested = false;  // SIGINT, SIGTERM or SIGHUP came.
  std::vector<ChildExit> exits;
};

class Supervisor {
 public:
  struct Config {
    std::string log_dir;  // Empty: the children's lines go to stderr, each after its child's name.
    bool raw_lines = false;              // Without the name: lines that are JSON stay JSON.
    std::function<void()> before_print;  // Takes a progress bar off the screen.
    // The line that says how many were dropped because nobody read them.
    std::function<std::string(std::int64_t)> dropped_note;
  };

  static absl::StatusOr<std::unique_ptr<Supervisor>> Create(Config config);
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  // INTERNAL: a child of that name runs, or the system refuses to start one.
  absl::Status Start(const std::string& name, const std::vector<std::string>& argv);
  // Waits for at most `timeout` for output, ends and signals, and returns what happened.
  SupervisorEvents Poll(absl::Duration timeout);
  // Writes to stderr or stdout, or puts it back until there is room; never waits.
  void Print(const std::string& text) { errors_.Add(text); }
  void PrintToStdout(const std::string& text) { output_.Add(text); }
  // At the end: waits for what was put back, a little while.
  void DrainOutput();
  // Nothing happens if no child of that name runs.
  void Signal(const std::string& name, int signal_number);

  bool IsRunning(const std::string& name) const { return children_.count(name) > 0; }
  bool AnyRunning() const { return !children_.empty(); }
  pid_t PidOf(const std::string& name) const;  // -1: not running
  // The last lines that the latest child of that name wrote.
  std::vector<std::string> LastLines(const std::string& name) const;
  std::string LogPath(const std::string& name) const;  // With Config::log_dir alone.

 private:
  struct Child {
    pid_t pid = -1;
    FileHandle output;    // The read end of its pipe; -1 where it logs to a file.
    std::string partial;  // A line not yet ended.
    absl::Time started;
  };

  explicit Supervisor(Config config);
  absl::StatusOr<FileHandle> OpenLog(const std::string& name) const;
  void ReadOutput(const std::string& name, Child& child);
  void PrintLine(const std::string& name, const std::string& line);
  void TakeSignals(SupervisorEvents& events);
  void Reap(SupervisorEvents& events);

  const Config config_;
  const Terminal terminal_;
  FileHandle signals_;
  OutputQueue errors_;
  OutputQueue output_;
  std::map<std::string, Child> children_;
  std::map<std::string, std::deque<std::string>> last_lines_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_SUPERVISOR_H_
