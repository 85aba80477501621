#include "runtime/microbench/spawn_self.h"

#include <spawn.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace epserve::runtime {

absl::StatusOr<pid_t> SpawnSelf(std::vector<std::string> args, int fd) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  // Onto itself or not, the copy in the child is not closed on exec.
  if (fd >= 0) posix_spawn_file_actions_adddup2(&actions, fd, kChildFd);
  std::string program = "epserve-microbench";
  std::vector<char*> argv = {program.data()};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    return absl::InternalError(absl::StrCat("start of ", absl::StrJoin(args, " "),
                                            ": posix_spawn failed: ", std::strerror(error)));
  }
  return pid;
}

}  // namespace epserve::runtime
