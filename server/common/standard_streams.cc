#include "server/common/standard_streams.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace epserve::server {
namespace {

struct Unfilled {
  int fd;     // -1: none
  int error;  // why
};
constinit Unfilled unfilled = {-1, 0};

// By system calls alone: it may run before a sanitizer is ready for libc's functions.
void FillClosedStreams() {
  unfilled = {-1, 0};
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (::syscall(SYS_fcntl, fd, F_GETFD) >= 0 || errno != EBADF) continue;
    // The lowest number that is free is this one. Inherited by children, as the others are.
    if (::syscall(SYS_openat, AT_FDCWD, "/dev/null", O_RDWR) == fd) continue;
    unfilled = {fd, errno};
    return;
  }
}

// Before the initializers of shared libraries, too: gRPC's opens descriptors.
[[gnu::section(".preinit_array"), gnu::used]] void (*fill_closed_streams)() = FillClosedStreams;

}  // namespace

absl::Status GuardStandardStreams() {
  ::signal(SIGPIPE, SIG_IGN);
  if (unfilled.fd < 0) FillClosedStreams();
  if (unfilled.fd < 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "start: descriptor ", unfilled.fd, " is closed and /dev/null cannot be opened for it (",
      std::strerror(unfilled.error), "); start it with one, or mount /dev"));
}

}  // namespace epserve::server
