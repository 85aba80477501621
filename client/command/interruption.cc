#include "client/command/interruption.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::client {
namespace {

absl::Status Refused(const char* call) {
  return absl::InternalError(absl::StrCat("interruption: ", call, ": ", std::strerror(errno)));
}

bool IsIgnored(int signal_number) {
  struct sigaction action = {};
  return sigaction(signal_number, nullptr, &action) == 0 && action.sa_handler == SIG_IGN;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Interruption>> Interruption::Create() {
  std::unique_ptr<Interruption> made(new Interruption);
  sigemptyset(&made->signals_);
  for (const int signal_number : {SIGINT, SIGTERM, SIGHUP}) {
    if (!IsIgnored(signal_number)) sigaddset(&made->signals_, signal_number);
  }
  made->signal_fd_ = FileHandle(signalfd(-1, &made->signals_, SFD_CLOEXEC));
  if (made->signal_fd_.get() < 0) return Refused("signalfd");
  made->stop_fd_ = FileHandle(eventfd(0, EFD_CLOEXEC));
  if (made->stop_fd_.get() < 0) return Refused("eventfd");
  pthread_sigmask(SIG_BLOCK, &made->signals_, &made->mask_before_);
  made->thread_ = std::thread([self = made.get()] { self->Watch(); });
  return made;
}

Interruption::~Interruption() {
  if (!thread_.joinable()) return;
  const std::uint64_t one = 1;
  while (write(stop_fd_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
  }
  thread_.join();
  pthread_sigmask(SIG_SETMASK, &mask_before_, nullptr);
}

void Interruption::SetCleanup(std::function<void()> cleanup) {
  absl::MutexLock lock(&mutex_);
  cleanup_ = std::move(cleanup);
}

void Interruption::Watch() {
  pollfd polled[] = {{signal_fd_.get(), POLLIN, 0}, {stop_fd_.get(), POLLIN, 0}};
  while (true) {
    if (poll(polled, std::size(polled), -1) < 0) continue;  // EINTR
    signalfd_siginfo info;
    if ((polled[0].revents & POLLIN) != 0 &&
        read(signal_fd_.get(), &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
      EndBy(static_cast<int>(info.ssi_signo));
    }
    if ((polled[1].revents & POLLIN) != 0) return;
  }
}

void Interruption::EndBy(int signal_number) {
  // Held to the end: whoever is about to take back what the cleanup uses waits, and the process
  // does not end in another way meanwhile.
  absl::MutexLock lock(&mutex_);
  if (cleanup_) cleanup_();
  sigset_t own;
  sigemptyset(&own);
  sigaddset(&own, signal_number);
  pthread_sigmask(SIG_UNBLOCK, &own, nullptr);
  // As if nobody had taken it: who started this process learns which signal it was.
  raise(signal_number);
  // Only the first process of a container is not ended by its own signals.
  constexpr int kEndedBySignal = 128;  // as shells say it
  _exit(kEndedBySignal + signal_number);
}

}  // namespace epserve::client
