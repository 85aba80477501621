// A completion queue's waits that look for a while before they sleep: an event that comes meanwhile
// costs no sleep and no wake-up, at the price of a core that is busy while there is traffic. Only a
// wait that follows some short ones looks: what comes now and then, as heartbeats and their answers
// do, is slept for, so that an idle service takes no core.
//
// Thread safety: of one thread at a time; the queue may have events from any.
#ifndef EPSERVE_SERVER_COMMON_BUSY_POLL_H_
#define EPSERVE_SERVER_COMMON_BUSY_POLL_H_

#include <grpc/support/time.h>
#include <grpcpp/completion_queue.h>

#include <algorithm>
#include <chrono>

namespace epserve::server {

inline constexpr auto kNoDeadline = std::chrono::system_clock::time_point::max();

class BusyPoll {
 public:
  // A heartbeat, what is written of it and what answers it are short waits, too, but fewer.
  static constexpr int kShortWaits = 6;

  // `busy`: how long a wait looks at most; one is short that ends within that. 0: none looks.
  explicit BusyPoll(std::chrono::microseconds busy) : busy_(busy) {}

  // As `queue`'s AsyncNext until `deadline`. What follows a TIMEOUT is still the same wait.
  grpc::CompletionQueue::NextStatus Next(grpc::CompletionQueue* queue,
                                         std::chrono::system_clock::time_point deadline, void** tag,
                                         bool* ok) {
    if (busy_.count() == 0) return queue->AsyncNext(tag, ok, deadline);
    if (!waits_) began_ = Clock::now();
    waits_ = true;
    const auto next = Wait(queue, deadline, tag, ok);
    if (next == grpc::CompletionQueue::TIMEOUT) return next;
    const bool was_short = Clock::now() - began_ <= busy_;
    short_waits_ = was_short ? std::min(short_waits_ + 1, kShortWaits) : 0;
    waits_ = false;
    return next;
  }

 private:
  using Clock = std::chrono::steady_clock;

  grpc::CompletionQueue::NextStatus Wait(grpc::CompletionQueue* queue,
                                         std::chrono::system_clock::time_point deadline, void** tag,
                                         bool* ok) const {
    // A deadline in the past: one look, which polls the sockets, too.
    while (short_waits_ == kShortWaits && Clock::now() - began_ < busy_) {
      const auto next = queue->AsyncNext(tag, ok, gpr_time_0(GPR_CLOCK_REALTIME));
      if (next != grpc::CompletionQueue::TIMEOUT) return next;
      if (deadline != kNoDeadline && std::chrono::system_clock::now() >= deadline) return next;
    }
    return queue->AsyncNext(tag, ok, deadline);
  }

  const std::chrono::microseconds busy_;
  int short_waits_ = 0;        // up to now in a row, no more than kShortWaits
  bool waits_ = false;         // a wait has begun and not ended
  Clock::time_point began_{};  // of that wait
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_BUSY_POLL_H_
