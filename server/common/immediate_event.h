// Operations on a completion queue that end while they are started, as most writes do.
//
// gRPC hands an operation's end to the thread that waits on the queue, which it wakes for that: two
// switches between threads for each message that another thread writes. Where the end has come by
// the time that the operation's start returns, it can be had at once instead.
#ifndef EPSERVE_SERVER_COMMON_IMMEDIATE_EVENT_H_
#define EPSERVE_SERVER_COMMON_IMMEDIATE_EVENT_H_

#include <grpc/grpc.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/impl/codegen/completion_queue_tag.h>

#include <optional>

namespace epserve::server {

struct ImmediateEvent {
  void* tag;
  bool ok;
};

// Calls `start`, which starts one operation on `queue`. Gives the first event of the queue that
// this brought about in this thread, as Next would have, and nothing where there was none. It may
// be another operation's than the one started; further ones come by the queue.
template <typename Start>
std::optional<ImmediateEvent> StartAndLook(grpc::CompletionQueue* queue, const Start& start) {
  grpc_completion_queue_thread_local_cache_init(queue->cq());
  start();
  void* tag = nullptr;
  int success = 0;
  if (grpc_completion_queue_thread_local_cache_flush(queue->cq(), &tag, &success) == 0) {
    return std::nullopt;
  }
  bool ok = success != 0;
  if (!static_cast<grpc::internal::CompletionQueueTag*>(tag)->FinalizeResult(&tag, &ok)) {
    return std::nullopt;
  }
  return ImmediateEvent{tag, ok};
}

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_IMMEDIATE_EVENT_H_
