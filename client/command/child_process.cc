#include "client/command/child_process.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"

namespace epserve::client {

absl::StatusOr<std::string> OwnProgramPath() {
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  if (size <= 0 || size == static_cast<ssize_t>(sizeof(path))) {
    return absl::InternalError(absl::StrCat("find own program: ", strerror(errno)));
  }
  return std::string(path, static_cast<std::size_t>(size));
}

absl::StatusOr<pid_t> SpawnChild(const std::vector<std::string>& argv, int output_fd) {
  EPC_ASSIGN_OR_RETURN(const std::string self, OwnProgramPath());
  std::vector<std::string> words = {self, kRunChildName, absl::StrCat(getpid())};
  words.insert(words.end(), argv.begin(), argv.end());
  std::vector<char*> raw;
  for (std::string& word : words) raw.push_back(word.data());
  raw.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, output_fd, 1);
  posix_spawn_file_actions_adddup2(&actions, output_fd, 2);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  sigset_t defaults;
  sigemptyset(&defaults);
  sigaddset(&defaults, SIGPIPE);
  posix_spawnattr_setsigdefault(&attributes, &defaults);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  pid_t pid = -1;
  const int error = posix_spawn(&pid, self.c_str(), &actions, &attributes, raw.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    return absl::InternalError(absl::StrCat("start '", argv[0], "': ", strerror(error)));
  }
  return pid;
}

int RunChild(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "epserve run-child: for the use of epserve up alone\n");
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // The parent may have died before the kernel was asked.
  if (getppid() != static_cast<pid_t>(std::atol(argv[2]))) return 1;
  execv(argv[3], argv + 3);
  std::fprintf(stderr, "epserve up: start '%s': %s\n", argv[3], strerror(errno));
  return 127;
}

std::string DescribeExit(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int signal_number = WTERMSIG(wait_status);
    return absl::StrCat("was killed by signal ", signal_number, " (", strsignal(signal_number),
                        ")");
  }
  return absl::StrCat("exited with code ", WEXITSTATUS(wait_status));
}

}  // namespace epserve::client
