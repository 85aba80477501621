// What an InferenceClient and its calls share. Internal to client/cpp.
#ifndef EPSERVE_CLIENT_CPP_CLIENT_CORE_H_
#define EPSERVE_CLIENT_CPP_CLIENT_CORE_H_

#include <grpcpp/channel.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/client.h"
#include "client/cpp/completion_thread.h"
#include "client/cpp/retry.h"
#include "inference/grpc_service.grpc.pb.h"

namespace epserve::client {

struct InferenceClient::Core {
  RetryPolicy retry;
  absl::Duration busy_poll;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub;

  // The thread of the next asynchronous call or stream: each in its turn, made when first needed.
  std::shared_ptr<CompletionThread> NextThread() {
    absl::MutexLock lock(&mutex);
    auto& thread = threads[next_thread++ % threads.size()];
    if (thread == nullptr) thread = std::make_shared<CompletionThread>(busy_poll);
    return thread;
  }

  absl::Mutex mutex;
  std::vector<std::shared_ptr<CompletionThread>> threads ABSL_GUARDED_BY(mutex);
  std::size_t next_thread ABSL_GUARDED_BY(mutex) = 0;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CLIENT_CORE_H_
