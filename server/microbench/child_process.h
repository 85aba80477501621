// A process that this program starts of itself: move-only, and ends the process when it
// goes.
#ifndef EPSERVE_SERVER_MICROBENCH_CHILD_PROCESS_H_
#define EPSERVE_SERVER_MICROBENCH_CHILD_PROCESS_H_

#include <sys/types.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace epserve::microbench {

class ChildProcess {
 public:
  // Starts this program with `args`. `fd` becomes runtime::kChildFd there; -1: nothing does.
  static absl::StatusOr<ChildProcess> Start(std::vector<std::string> args, int fd = -1);
  ~ChildProcess();
  ChildProcess(ChildProcess&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  ChildProcess& operator=(ChildProcess&&) = delete;

 private:
  explicit ChildProcess(pid_t pid) : pid_(pid) {}
  pid_t pid_;  // -1: none
};

// To be called by a child as it starts: it ends when its parent does.
void EndWithParent();

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_CHILD_PROCESS_H_
