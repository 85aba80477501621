// One asynchronous unary call: attempts and the waits between them, one after another. Internal to
// client/cpp; the contract stands in client.h, at InferAsync.
#ifndef EPSERVE_CLIENT_CPP_ASYNC_CALL_H_
#define EPSERVE_CLIENT_CPP_ASYNC_CALL_H_

#include <grpcpp/alarm.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/client.h"
#include "client/cpp/completion_thread.h"
#include "client/cpp/infer_message.h"
#include "client/cpp/retry.h"

namespace epserve::client {

// The deadline, if there is one, and the request's metadata.
void PrepareAttempt(const InferRequest& request, absl::Time deadline, grpc::ClientContext& context);

// How the attempt has ended; an error with the server's pushback (see RetryPushback).
absl::Status OutcomeOf(const grpc::Status& status, const grpc::ClientContext& context);

// The wait before the next attempt, or nullopt if the status stands. A wait that the deadline would
// cut short is not begun: the caller learns the server's reason now.
std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, int attempt,
                                         const absl::Status& status,
                                         const grpc::ClientContext& context, absl::Time deadline);

// Keeps itself while an operation is under way. The mutex guards what Cancel and the thread share;
// `done` runs outside it.
class AsyncCall final : public PendingInfer, private CompletionThread::Operation {
 public:
  // A request that cannot be right is refused by the callback, without a call.
  AsyncCall(std::shared_ptr<grpc::Channel> channel, std::shared_ptr<CompletionThread> thread,
            const RetryPolicy& retry, const InferRequest& request, InferCallback done,
            TensorBytes spare);

  // `self` is this. Once.
  static void Start(const std::shared_ptr<AsyncCall>& self);
  void Cancel() override;

 private:
  void Attempt() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Wait(absl::Duration delay) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Done(bool ok) override;
  // How the call has ended, or nullopt where another operation is under way.
  std::optional<absl::Status> Proceed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<CompletionThread> thread_;  // outlives what is on its queue
  const std::shared_ptr<grpc::Channel> channel_;
  grpc::GenericStub stub_;
  const RetryPolicy retry_;
  const absl::Time deadline_;
  const ExpectedOutput expected_;
  InferRequest request_;  // What PrepareAttempt needs; the tensors are in the message.
  absl::Status refusal_;  // not OK: nothing is sent
  grpc::ByteBuffer message_;
  InferCallback done_;
  TensorBytes spare_;
  // The attempt's, then Done's.
  grpc::ByteBuffer reply_;
  grpc::Status status_;

  absl::Mutex mutex_;
  std::shared_ptr<AsyncCall> self_ ABSL_GUARDED_BY(mutex_);  // while an operation is under way
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  int attempt_ ABSL_GUARDED_BY(mutex_) = 0;
  // Of the attempt under way.
  std::unique_ptr<grpc::ClientContext> context_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> rpc_ ABSL_GUARDED_BY(mutex_);
  // While it waits, in place of an attempt.
  std::unique_ptr<grpc::Alarm> alarm_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_ASYNC_CALL_H_
