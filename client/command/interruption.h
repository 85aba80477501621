// What a command gives back before SIGINT, SIGTERM or SIGHUP ends it: memory that it has registered
// with a service, say, which nobody else would unregister.
//
// A signal that the process was started to ignore, as by nohup, stays ignored. Signals that come
// while the cleanup runs change nothing: a terminal that closes sends SIGHUP twice. So a cleanup is
// to bound its time.
//
// Thread safety: SetCleanup from any thread.
#ifndef EPSERVE_CLIENT_COMMAND_INTERRUPTION_H_
#define EPSERVE_CLIENT_COMMAND_INTERRUPTION_H_

#include <signal.h>

#include <functional>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/file_handle.h"

namespace epserve::client {

class Interruption {
 public:
  // REQUIRES: the process has no other thread yet. The signals are blocked in this one, and so in
  // those that it starts: a thread of this object's alone takes them. INTERNAL: the system refuses.
  static absl::StatusOr<std::unique_ptr<Interruption>> Create();
  // From then on signals end the process as they did before.
  ~Interruption();
  Interruption(const Interruption&) = delete;
  Interruption& operator=(const Interruption&) = delete;

  // Called when a signal comes, from this object's thread, before the process ends by that signal;
  // null: nothing is. Once a signal has come this does not return.
  void SetCleanup(std::function<void()> cleanup);

 private:
  Interruption() = default;
  void Watch();
  void EndBy(int signal_number);

  sigset_t signals_ = {};      // those that are not ignored
  sigset_t mask_before_ = {};  // of the thread that made this
  FileHandle signal_fd_;
  FileHandle stop_fd_;
  absl::Mutex mutex_;
  std::function<void()> cleanup_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_INTERRUPTION_H_
