#include "client/cpp/completion_thread.h"

namespace epserve::client {

CompletionThread::CompletionThread()
    : queue_(std::make_shared<grpc::CompletionQueue>()), thread_([queue = queue_] {
        void* tag = nullptr;
        bool ok = false;
        while (queue->Next(&tag, &ok)) static_cast<Operation*>(tag)->Done(ok);
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
