// A completion queue of gRPC's, and the one thread that serves it: asynchronous calls end on it,
// one after another. Internal to client/cpp.
//
// Thread safety: the queue is gRPC's and takes operations from any thread. Whoever has one under
// way holds this. The last holder may let go on the thread itself.
#ifndef EPSERVE_CLIENT_CPP_COMPLETION_THREAD_H_
#define EPSERVE_CLIENT_CPP_COMPLETION_THREAD_H_

#include <grpcpp/completion_queue.h>

#include <memory>
#include <thread>

#include "absl/time/time.h"

namespace epserve::client {

class CompletionThread {
 public:
  // An operation's tag. Done runs on the thread once the operation has ended, and must not block.
  class Operation {
   public:
    virtual void Done(bool ok) = 0;

   protected:
    ~Operation() = default;
  };

  // Looks for the next event for `busy_poll` before it sleeps.
  explicit CompletionThread(absl::Duration busy_poll);
  ~CompletionThread();
  CompletionThread(const CompletionThread&) = delete;
  CompletionThread& operator=(const CompletionThread&) = delete;

  grpc::CompletionQueue* queue() { return queue_.get(); }  // its tags are Operations

 private:
  const std::shared_ptr<grpc::CompletionQueue> queue_;
  std::thread thread_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_COMPLETION_THREAD_H_
