// A completion queue's wait that looks for a while before it sleeps: an event that comes meanwhile
// costs no sleep and no wake-up, at the price of a core that is busy for so long after each event.
// Thread-safe, as the queue is.
#ifndef EPSERVE_SERVER_COMMON_BUSY_POLL_H_
#define EPSERVE_SERVER_COMMON_BUSY_POLL_H_

#include <grpc/support/time.h>
#include <grpcpp/completion_queue.h>

#include <chrono>

namespace epserve::server {

inline constexpr auto kNoDeadline = std::chrono::system_clock::time_point::max();

// As `queue`'s AsyncNext until `deadline`, with the first `busy` of the wait spent looking.
inline grpc::CompletionQueue::NextStatus BusyNext(grpc::CompletionQueue* queue,
                                                  std::chrono::microseconds busy,
                                                  std::chrono::system_clock::time_point deadline,
                                                  void** tag, bool* ok) {
  using Clock = std::chrono::steady_clock;
  const auto end = busy.count() > 0 ? Clock::now() + busy : Clock::time_point();
  // A deadline in the past: one look, which polls the sockets, too.
  while (busy.count() > 0 && Clock::now() < end) {
    const auto next = queue->AsyncNext(tag, ok, gpr_time_0(GPR_CLOCK_REALTIME));
    if (next != grpc::CompletionQueue::TIMEOUT) return next;
    if (deadline != kNoDeadline && std::chrono::system_clock::now() >= deadline) return next;
  }
  return queue->AsyncNext(tag, ok, deadline);
}

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_BUSY_POLL_H_
