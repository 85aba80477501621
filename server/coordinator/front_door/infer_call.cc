#include "server/coordinator/front_door/infer_call.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/coordinator/front_door/request_validation.h"

namespace epserve::coordinator {
namespace {

using Clock = InferCall::Clock;

Clock::time_point EarlierOf(Clock::time_point deadline, Clock::time_point now,
                            std::int64_t timeout_us) {
  constexpr std::int64_t kYearUs = std::int64_t{365} * 24 * 3600 * 1'000'000;
  if (timeout_us == 0 || timeout_us > kYearUs) return deadline;
  return std::min(deadline, now + std::chrono::microseconds(timeout_us));
}

absl::Status TooLate() {
  return absl::DeadlineExceededError("infer: the deadline had passed when the request arrived");
}

}  // namespace

class InferCall::Pending final : public PendingRequest {
 public:
  Pending(std::uint64_t request_id, Clock::time_point arrived_at, Clock::time_point ends_at,
          ValidatedRequest validated, InferRequestMessage message, MemoryBudget::Share memory,
          std::shared_ptr<InferCall> call)
      : PendingRequest(request_id, arrived_at, ends_at, std::move(validated)),
        call_(std::move(call)),
        message_(std::move(message)),
        memory_(std::move(memory)) {
    caller = call_->connection_;
  }

  ~Pending() override {
    if (completed_) return;
    call_->Answer({absl::InternalError("infer: the request was dropped without an answer"), {}},
                  nullptr, {});
  }

  std::span<char> MutableOutput() override {
    if (output_.size() != request.output_bytes) output_ = OutputBytes(request.output_bytes);
    return output_.mutable_bytes();
  }

  void TakeOutput(std::span<const char> rows, std::shared_ptr<const void> owner) override {
    output_ = OutputBytes(rows, std::move(owner));
  }

  void Complete(Completion completion) override {
    if (std::exchange(completed_, true)) return;
    call_->Answer(completion, &request, std::move(output_));
  }

 private:
  const std::shared_ptr<InferCall> call_;
  const InferRequestMessage message_;  // what `request` points into
  const MemoryBudget::Share memory_;   // of that, and of what was copied beside it
  OutputBytes output_;                 // becomes the reply's raw entry without another copy
  bool completed_ = false;
};

InferCall::InferCall(InferContext& shared, InferForm form, std::uint64_t connection,
                     OnAnswer on_answer)
    : shared_(shared),
      form_(form),
      connection_(connection),
      arrival_(Clock::now()),
      on_answer_(std::move(on_answer)) {}

Clock::time_point InferCall::DeadlineOf(const grpc::ServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return Clock::time_point::max();
  const auto left = deadline - std::chrono::system_clock::now();
  // A deadline so far off that it does not fit the other clock is none.
  if (left > std::chrono::hours(24 * 365)) return Clock::time_point::max();
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(left);
}

void InferCall::Start(const grpc::ByteBuffer& bytes, Clock::time_point deadline,
                      bool message_came) {
  deadline_ = deadline;
  const absl::Status status = Submit(bytes, message_came);
  if (!status.ok()) Fail(status);
}

void InferCall::AwaitCaller(std::function<void()> give_up) {
  memory_.AwaitCaller(std::move(give_up));
}

void InferCall::ReplyGone() { memory_.Release(); }

void InferCall::Fail(const absl::Status& status) { Answer({status, {}}, nullptr, {}); }

absl::Status InferCall::Submit(const grpc::ByteBuffer& bytes, bool message_came) {
  if (deadline_ <= Clock::now()) return TooLate();
  if (!message_came) {
    return absl::CancelledError("infer: the caller cancelled the request before it had arrived");
  }
  EPS_RETURN_IF_ERROR(memory_.Grow(static_cast<std::int64_t>(bytes.Length())));
  EPS_ASSIGN_OR_RETURN(InferRequestMessage message, ParseInferRequest(bytes, shared_.limits));
  caller_id_ = message.id;
  EPS_ASSIGN_OR_RETURN(
      ValidatedRequest request,
      ValidateRequest(message.view, shared_.options.model, shared_.limits, shared_.regions));
  const std::size_t copied_bytes = request.hidden_copy != nullptr ? request.hidden.size() : 0;
  const std::size_t output_bytes = request.output.region == nullptr ? request.output_bytes : 0;
  EPS_RETURN_IF_ERROR(memory_.Grow(static_cast<std::int64_t>(output_bytes + copied_bytes)));
  deadline_ = EarlierOf(deadline_, arrival_, request.timeout_us);
  if (deadline_ <= Clock::now()) return TooLate();
  id_ = shared_.next_id.fetch_add(1, std::memory_order_relaxed);
  shared_.sink.Submit(std::make_unique<Pending>(
      id_, arrival_, deadline_, std::move(request), std::move(message),
      memory_.Split(static_cast<std::int64_t>(bytes.Length() + copied_bytes)), shared_from_this()));
  return absl::OkStatus();
}

void InferCall::Answer(const Completion& completion, const ValidatedRequest* request,
                       OutputBytes output) {
  // acq_rel: what Start() wrote is seen by whichever thread wins.
  if (answered_.exchange(true, std::memory_order_acq_rel)) return;
  if (!completion.status.ok()) {
    memory_.Release();  // Message and output have gone; what tells of it is small.
    return FinishWith(completion.status, {}, {}, completion.retry_pushback_ms);
  }
  absl::StatusOr<ReplyBytes> reply = MakeReply(completion.times, *request, std::move(output));
  if (!reply.ok()) {
    memory_.Release();
    return FinishWith(reply.status(), {}, {}, 0);
  }
  FinishWith(absl::OkStatus(), *std::move(reply), completion.times, 0);
}

absl::StatusOr<ReplyBytes> InferCall::MakeReply(const InferTimes& times,
                                                const ValidatedRequest& request,
                                                OutputBytes output) {
  const std::size_t expected = request.output.region == nullptr ? request.output_bytes : 0;
  if (output.size() != expected) {
    return absl::InternalError(
        absl::StrCat("infer: the batch gave ", output.size(), " output bytes, not ", expected));
  }
  InferReply reply;
  reply.id = caller_id_;
  reply.request = &request;
  reply.times = times;
  reply.server_us =
      std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - arrival_).count();
  reply.output = std::move(output);
  EPS_ASSIGN_OR_RETURN(ReplyBytes bytes,
                       SerializeInferReply(shared_.options.model, form_, std::move(reply)));
  // Validation has left room for the usual; a long id, or a trace of many workers, may need more.
  const std::uint64_t most_bytes = shared_.options.model.max_message_bytes;
  if (bytes->Length() <= most_bytes) return bytes;
  return absl::InvalidArgumentError(absl::StrCat(
      "infer: the reply has ", bytes->Length(), " bytes, ", expected,
      " of them output, more than --max-message-bytes ", most_bytes,
      "; give the output a shared_memory_region, split the request, use a shorter id, ask for no "
      "epserve_trace, or raise the flag"));
}

void InferCall::FinishWith(const absl::Status& status, ReplyBytes reply, const InferTimes& times,
                           std::int64_t retry_pushback_ms) {
  InferAnswer answer;
  answer.status = status;
  answer.message = std::move(reply);
  if (absl::IsResourceExhausted(status)) {
    answer.retry_pushback_ms =
        retry_pushback_ms > 0 ? retry_pushback_ms : shared_.options.retry_pushback_ms;
  }
  if (!status.ok() && form_ == InferForm::kStream) {
    answer.message =
        SerializeStreamError(shared_.options.model, caller_id_, status, answer.retry_pushback_ms);
  }
  const auto server_time = Clock::now() - arrival_;
  shared_.statistics.Add(status.ok(), server_time, times);
  shared_.sink.OnAnswered(status.code(), server_time);
  std::exchange(on_answer_, nullptr)(std::move(answer));
}

void InferCall::Cancel() {
  if (answered_.exchange(true, std::memory_order_acq_rel)) return;
  shared_.sink.Cancel(id_);
  FinishWith(Clock::now() >= deadline_
                 ? absl::DeadlineExceededError("infer: the deadline passed before the answer")
                 : absl::CancelledError("infer: the caller cancelled the request"),
             {}, {}, 0);
}

}  // namespace epserve::coordinator
