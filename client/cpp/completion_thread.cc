#include "client/cpp/completion_thread.h"

#include <grpc/support/time.h>

#include <chrono>

namespace epserve::client {
namespace {

// As the queue's Next, with the first `busy` of the wait spent looking.
bool Next(grpc::CompletionQueue& queue, std::chrono::nanoseconds busy, void** tag, bool* ok) {
  using Clock = std::chrono::steady_clock;
  if (busy.count() > 0) {
    const auto end = Clock::now() + busy;
    do {
      // A deadline in the past: one look, which polls the sockets, too.
      const auto next = queue.AsyncNext(tag, ok, gpr_time_0(GPR_CLOCK_REALTIME));
      if (next != grpc::CompletionQueue::TIMEOUT) return next == grpc::CompletionQueue::GOT_EVENT;
    } while (Clock::now() < end);
  }
  return queue.Next(tag, ok);
}

}  // namespace

CompletionThread::CompletionThread(absl::Duration busy_poll)
    : queue_(std::make_shared<grpc::CompletionQueue>()),
      thread_([queue = queue_, busy = absl::ToChronoNanoseconds(busy_poll)] {
        void* tag = nullptr;
        bool ok = false;
        while (Next(*queue, busy, &tag, &ok)) static_cast<Operation*>(tag)->Done(ok);
      }) {}

CompletionThread::~CompletionThread() {
  queue_->Shutdown();
  // A thread cannot wait for its own end; it has the queue to itself then, which is empty.
  if (std::this_thread::get_id() == thread_.get_id()) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

}  // namespace epserve::client
