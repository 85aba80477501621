#include "server/microbench/child_process.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <cerrno>
#include <utility>

#include "runtime/base/status.h"
#include "runtime/microbench/spawn_self.h"

namespace epserve::microbench {

absl::StatusOr<ChildProcess> ChildProcess::Start(std::vector<std::string> args, int fd) {
  EPS_ASSIGN_OR_RETURN(const pid_t pid, runtime::SpawnSelf(std::move(args), fd));
  return ChildProcess(pid);
}

ChildProcess::~ChildProcess() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

void EndWithParent() { ::prctl(PR_SET_PDEATHSIG, SIGKILL); }

}  // namespace epserve::microbench
