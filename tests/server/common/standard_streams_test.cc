#include "server/common/standard_streams.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

namespace epserve::server {
namespace {

// What `run` returns in a child process of its own; -1 where a signal ends it.
template <typename Run>
int ExitCodeOf(Run run) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(run());
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool IsDevNull(int fd) {
  struct stat expected {};
  struct stat found {};
  return ::stat("/dev/null", &expected) == 0 && ::fstat(fd, &found) == 0 &&
         found.st_rdev == expected.st_rdev;
}

TEST(StandardStreamsTest, ClosedOnesAreDevNullAndOpenOnesStay) {
  EXPECT_EQ(ExitCodeOf([] {
              int ends[2];
              if (::pipe(ends) != 0 || ::dup2(ends[1], STDOUT_FILENO) < 0) return 1;
              ::close(STDIN_FILENO);
              ::close(STDERR_FILENO);
              if (!GuardStandardStreams().ok()) return 2;
              if (!IsDevNull(STDIN_FILENO) || !IsDevNull(STDERR_FILENO)) return 3;
              char read_back = 0;
              if (::write(STDOUT_FILENO, "x", 1) != 1) return 4;
              return ::read(ends[0], &read_back, 1) == 1 && read_back == 'x' ? 0 : 5;
            }),
            0);
}

TEST(StandardStreamsTest, WriteToAPipeThatNobodyReadsFailsAndEndsNothing) {
  EXPECT_EQ(ExitCodeOf([] {
              ::signal(SIGPIPE, SIG_DFL);
              if (!GuardStandardStreams().ok()) return 1;
              int ends[2];
              if (::pipe(ends) != 0) return 2;
              ::close(ends[0]);
              return ::write(ends[1], "x", 1) == -1 && errno == EPIPE ? 0 : 3;
            }),
            0);
}

}  // namespace
}  // namespace epserve::server
