// What the front door hands its requests to: the coordinator's host behind it, or a fake in a test.
//
//   ModelInfer ─► validate ─► RequestSink::Submit(PendingRequest)
//                                 rows into MutableOutput() or by TakeOutput(), or into
//                                 the request's output window, then Complete() ─► reply
//   caller gone ─► RequestSink::Cancel(id)
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_SINK_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_SINK_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/front_door/validated_request.h"

namespace epserve::coordinator {

// One worker's part in a batch, on the machine's monotonic clock.
struct RankTimes {
  int rank = 0;
  std::int64_t start_ns = 0;  // its shard had come
  std::int64_t assign_ns = 0;
  std::int64_t counts_ns = 0;
  std::int64_t dispatch_ns = 0;
  std::int64_t ffn_ns = 0;
  std::int64_t combine_ns = 0;
};

// Where a request's time went; what the worker phases took is the most that any worker took.
struct InferTimes {
  std::int64_t queue_us = 0;
  std::int64_t assign_us = 0;
  std::int64_t counts_ns = 0;  // what the count matrix took, whoever made it
  std::int64_t dispatch_us = 0;
  std::int64_t ffn_us = 0;
  std::int64_t combine_us = 0;
  std::uint64_t epoch = 0;
  const char* count_exchange = "";  // how the matrix was made: "coordinator", "streams", "device"
  std::int64_t started_us = 0;      // monotonic clock: the batch went to the workers
  std::vector<RankTimes> ranks;     // where the request asked for its trace
};

struct Completion {
  absl::Status status;
  InferTimes times;  // meaningful where status is OK
  // With RESOURCE_EXHAUSTED: when the caller may try again; 0: the front door's default.
  std::int64_t retry_pushback_ms = 0;
};

// One validated request on its way. Whoever owns it uses it from one thread at a time; the caller
// going away in the meantime disturbs none of its memory. Destroyed without Complete() it answers
// INTERNAL, so that no caller ever waits for nothing.
class PendingRequest {
 public:
  using Clock = std::chrono::steady_clock;

  PendingRequest(std::uint64_t request_id, Clock::time_point arrived_at, Clock::time_point ends_at,
                 ValidatedRequest validated)
      : id(request_id), arrival(arrived_at), deadline(ends_at), request(std::move(validated)) {}
  virtual ~PendingRequest() = default;
  PendingRequest(const PendingRequest&) = delete;
  PendingRequest& operator=(const PendingRequest&) = delete;

  // [T, H] in the request's type: the place of the output rows. Every byte is to be written before
  // Complete(OK). Valid, at the same address, until Complete() or destruction. Not for a request
  // with an output window, whose rows go there.
  virtual std::span<char> MutableOutput() = 0;

  // In place of that: all output rows, where somebody else has them. They stay as they are until
  // `owner` goes, which may be when the caller has taken the reply, long after Complete().
  virtual void TakeOutput(std::span<const char> rows, std::shared_ptr<const void> owner) = 0;

  // Answers the caller, unless it has been answered or has gone. The first call counts; the hidden
  // states and MutableOutput() must not be used after it. Does not block.
  virtual void Complete(Completion completion) = 0;

  const std::uint64_t id;  // unique in this process, from 1
  const Clock::time_point arrival;
  const Clock::time_point deadline;  // time_point::max(): none
  const ValidatedRequest request;
  std::uint64_t caller = 0;  // the connection that it came by; callers take turns
};

// Thread-safe: gRPC calls these from its own threads. No call may block or wait for another
// request.
class RequestSink {
 public:
  virtual ~RequestSink() = default;

  // Takes a request over, and completes it once, from any thread, within this call or later: with
  // the rows, or with the Status that stands in their way (UNAVAILABLE, RESOURCE_EXHAUSTED, ...).
  virtual void Submit(std::unique_ptr<PendingRequest> request) = 0;

  // The caller of a submitted request has gone and been answered (cancelled, or its deadline has
  // passed): frees its place in the queue, or drops its result when that comes. The request may
  // have been completed at the same moment; an id that is not known is ignored.
  virtual void Cancel(std::uint64_t id) = 0;

  // A small batch has gone through every worker of the present epoch and come back right.
  virtual bool ready() const = 0;

  // Called once for every ModelInfer, whether it was refused, completed or cancelled, before the
  // answer leaves; `server_time` is from arrival to answer.
  virtual void OnAnswered(absl::StatusCode code, std::chrono::nanoseconds server_time) = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_SINK_H_
