// What a run has made on the file system, taken away again unless the run comes to its end: an
// incomplete result helps nobody, and its disk may be full.
//
// Thread safety: one thread makes files; a signal's cleanup comes from another.
#ifndef EPSERVE_CLIENT_COMMAND_UNDO_H_
#define EPSERVE_CLIENT_COMMAND_UNDO_H_

#include <filesystem>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/command/interruption.h"

namespace epserve::client {

class Undo {
 public:
  // A signal that `interruption` takes undoes, too. Null: a signal ends the process as it is.
  explicit Undo(Interruption* interruption);
  ~Undo();
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;

  // Held from before something is made or renamed until it has been told by Made, so that no signal
  // comes between.
  class Step {
   public:
    explicit Step(Undo* undo) : undo_(*undo), lock_(&undo->mutex_) {}
    void Made(std::filesystem::path path) ABSL_NO_THREAD_SAFETY_ANALYSIS {
      undo_.paths_.push_back(std::move(path));
    }

   private:
    Undo& undo_;
    absl::MutexLock lock_;
  };

  // All of it is to stay.
  void Keep();

 private:
  void Remove() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnInterruption() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void EndCleanup();

  Interruption* const interruption_;
  absl::Mutex mutex_;
  std::vector<std::filesystem::path> paths_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_UNDO_H_
