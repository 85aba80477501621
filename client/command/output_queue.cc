#include "client/command/output_queue.h"

#include <limits.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/time/clock.h"

namespace epserve::client {

namespace {

// Minutes of the children's logs, and nothing beside their memory.
constexpr std::size_t kMaxWaitingBytes = 1 << 20;
// A pipe that can be written to has room for so much.
constexpr std::size_t kPieceBytes = PIPE_BUF;

bool HasRoom(int fd, int timeout_ms) {
  pollfd polled{fd, POLLOUT, 0};
  return poll(&polled, 1, timeout_ms) > 0;
}

}  // namespace

void OutputQueue::Add(const std::string& text) {
  if (waiting_.size() + text.size() > kMaxWaitingBytes) Flush();
  if (waiting_.size() + text.size() > kMaxWaitingBytes) {
    ++dropped_;
    return;
  }
  if (dropped_ > 0) waiting_ += dropped_note_(std::exchange(dropped_, 0));
  waiting_ += text;
  Flush();
}

void OutputQueue::Flush() {
  while (!waiting_.empty() && HasRoom(fd_, 0)) {
    const ssize_t written = write(fd_, waiting_.data(), std::min(waiting_.size(), kPieceBytes));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EAGAIN) return;
    // Nobody will ever read it: there is nobody to tell either.
    waiting_.erase(0, written < 0 ? std::string::npos : static_cast<std::size_t>(written));
  }
  if (waiting_.empty() && dropped_ > 0) {
    waiting_ = dropped_note_(std::exchange(dropped_, 0));
    Flush();
  }
}

void OutputQueue::Drain(absl::Duration patience) {
  const absl::Time until = absl::Now() + patience;
  Flush();
  for (absl::Time now = absl::Now(); !waiting_.empty() && now < until; now = absl::Now()) {
    HasRoom(fd_, static_cast<int>(absl::ToInt64Milliseconds(until - now)) + 1);
    Flush();
  }
}

}  // namespace epserve::client
