// One inference request, of a ModelInfer call or of a stream: parse, validate, submit, and answer
// exactly once, whoever comes first of the sink's completion and the caller's going away.
//
// Memory: the sink's PendingRequest has the parsed message, which goes with it; an unread reply
// does not keep it.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_CALL_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "server/coordinator/front_door/infer_proto_convert.h"
#include "server/coordinator/front_door/infer_statistics.h"
#include "server/coordinator/front_door/memory_budget.h"
#include "server/coordinator/front_door/output_bytes.h"
#include "server/coordinator/front_door/request_bounds.h"
#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/front_door/request_view.h"
#include "server/coordinator/front_door/served_model.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {

struct FrontDoorOptions {
  ServedModel model;
  // With RESOURCE_EXHAUSTED, unless the sink says otherwise: a few batches' time.
  std::int64_t retry_pushback_ms = 50;
  // See MemoryBudget.
  std::int64_t max_held_bytes = std::int64_t{4} << 30;
};

// What every request needs; outlives them all.
struct InferContext {
  const FrontDoorOptions& options;
  const ShmRegistry& regions;
  RequestSink& sink;
  RequestLimits limits = RequestLimitsOf(options.model);
  MemoryBudget memory{options.max_held_bytes};
  InferStatistics statistics;
  std::atomic<std::uint64_t> next_id{1};
};

struct InferAnswer {
  absl::Status status;
  ReplyBytes message;                  // in the form asked for; null: of kUnary, status not OK
  std::int64_t retry_pushback_ms = 0;  // with RESOURCE_EXHAUSTED
};

// Thread-safe.
class InferCall final : public std::enable_shared_from_this<InferCall> {
 public:
  using Clock = PendingRequest::Clock;
  using OnAnswer = std::function<void(InferAnswer)>;

  // `on_answer` is called once, from any thread, within Start() or later. Does not block.
  // `connection`: see server::ServerCall.
  InferCall(InferContext& shared, InferForm form, std::uint64_t connection, OnAnswer on_answer);

  // `bytes` is the request's message; `message_came` false: the call ended on its message's way.
  void Start(const grpc::ByteBuffer& bytes, Clock::time_point deadline, bool message_came);

  // Answers, in the place of Start().
  void Fail(const absl::Status& status);

  // The caller has gone: answers, unless that has been done, with CANCELLED or DEADLINE_EXCEEDED.
  void Cancel();

  // Around the sending of a reply. Between the two `give_up` may be called, once and from any
  // thread, because others need the memory: see MemoryBudget::Share.
  void AwaitCaller(std::function<void()> give_up);
  void ReplyGone();

  // The caller's deadline on the monotonic clock; max(): none.
  static Clock::time_point DeadlineOf(const grpc::ServerContext& context);

 private:
  class Pending;

  absl::Status Submit(const grpc::ByteBuffer& bytes, bool message_came);
  void Answer(const Completion& completion, const ValidatedRequest* request, OutputBytes output);
  absl::StatusOr<ReplyBytes> MakeReply(const InferTimes& times, const ValidatedRequest& request,
                                       OutputBytes output);
  void FinishWith(const absl::Status& status, ReplyBytes reply, const InferTimes& times,
                  std::int64_t retry_pushback_ms);

  InferContext& shared_;
  // Of the output and the reply, and at first of the message: whoever sends the reply keeps this
  // object until the caller has taken it.
  MemoryBudget::Share memory_{shared_.memory};
  const InferForm form_;
  const std::uint64_t connection_;
  const Clock::time_point arrival_;
  OnAnswer on_answer_;  // for whoever has won `answered_`

  // Written in Start(), before any other thread knows of the request.
  std::string caller_id_;  // what the caller calls it
  std::uint64_t id_ = 0;
  Clock::time_point deadline_ = Clock::time_point::max();

  std::atomic<bool> answered_{false};
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_CALL_H_
