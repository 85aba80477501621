#include "runtime/base/line_writer.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>
#include <utility>

namespace epserve::runtime {
namespace {

// Hours of a service's log, and nothing beside its memory.
constexpr std::size_t kMaxWaitingBytes = 1 << 20;

// A line is written in some 20 us. A tenth of a second is long enough for a thread of a machine
// that is busy, and far less than the lease of a worker that would wait so long.
constexpr std::chrono::milliseconds kPatience{100};
// After a wait in vain, also where the reader has caught up before: one that is merely slow costs
// its writers a tenth of their time then.
constexpr std::chrono::seconds kWaitsAgainAfter{1};

void WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EAGAIN) {  // Whoever shares the descriptor has made it so.
      pollfd polled{fd, POLLOUT, 0};
      ::poll(&polled, 1, -1);
    } else if (errno != EINTR) {
      return;  // Nobody will ever read it: there is nobody to tell either.
    }
  }
}

// A thread that takes no signal: those are for the threads that the process has for them.
template <typename Run>
std::thread StartWithoutSignals(Run run) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(std::move(run));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace

LineWriter::LineWriter(int fd, DroppedNote dropped_note)
    : fd_(fd),
      dropped_note_(std::move(dropped_note)),
      thread_(StartWithoutSignals([this] { Run(); })) {}

LineWriter::~LineWriter() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  has_work_.notify_one();
  thread_.join();
}

void LineWriter::Write(std::string line) {
  std::unique_lock lock(mutex_);
  waiting_bytes_ += line.size();
  const std::uint64_t number = ++last_taken_;
  waiting_.push_back({number, std::move(line)});
  while (waiting_bytes_ > kMaxWaitingBytes && waiting_.size() > 1) {
    waiting_bytes_ -= waiting_.front().text.size();
    waiting_.pop_front();
    ++num_dropped_;
  }
  has_work_.notify_one();
  const TimePoint now = std::chrono::steady_clock::now();
  if (reader_is_late_ || now < waits_again_at_) return;
  const bool done = progressed_.wait_until(
      lock, now + kPatience, [this, number] { return last_written_ >= number || reader_is_late_; });
  if (done) return;
  reader_is_late_ = true;
  waits_again_at_ = std::chrono::steady_clock::now() + kWaitsAgainAfter;
  progressed_.notify_all();
}

bool LineWriter::Flush(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  return progressed_.wait_for(lock, patience, [this] { return waiting_.empty() && !writing_; });
}

void LineWriter::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    has_work_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
    if (stopping_) return;
    const Line line = std::move(waiting_.front());
    waiting_.pop_front();
    waiting_bytes_ -= line.text.size();
    const std::int64_t num_dropped = std::exchange(num_dropped_, 0);
    writing_ = true;
    lock.unlock();
    if (num_dropped > 0) WriteAll(fd_, dropped_note_(num_dropped));
    WriteAll(fd_, line.text);
    lock.lock();
    writing_ = false;
    last_written_ = line.number;
    if (waiting_.empty()) reader_is_late_ = false;
    progressed_.notify_all();
  }
}

}  // namespace epserve::runtime
