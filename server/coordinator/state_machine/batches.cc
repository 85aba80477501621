// Requests and batches: the front door's side, and what workers say of a batch.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/common/small_batch.h"
#include "server/coordinator/state_machine/state_machine_impl.h"

namespace epserve::coordinator {
namespace {

// Longer ones are worth a second one beside them, however few their rows are.
constexpr std::int64_t kShortBatchUs = 2000;

// Where the workers route, a single source routes and pushes all rows by itself: with 16 of them a
// batch took a quarter longer than divided, with 4 it took less.
constexpr std::int64_t kMostRowsRoutedByOne = 4;

// How long requests are taken in at most while nothing is in flight: what 64 small ones take.
constexpr std::int64_t kMostGatherUs = 2000;

// Codes that tell of a peer, a lease or a timeout rather than of this worker's own work: the epoch
// cannot be trusted any more.
bool EndsEpoch(absl::StatusCode code) {
  return code == absl::StatusCode::kAborted || code == absl::StatusCode::kDeadlineExceeded ||
         code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kCancelled;
}

}  // namespace

// ---- requests

std::string StateMachine::Impl::WhyNotServing() const {
  if (cluster_draining_) return "infer: the coordinator is draining; retry at another one";
  if (epoch_closing_) return "infer: a worker is leaving; retry when the service is ready";
  const int joined = membership_.NumRanksTaken();
  const std::string workers =
      absl::StrCat(" (", joined, " of ", config_.num_workers, " workers joined)");
  if (joined < config_.num_workers) {
    return absl::StrCat("infer: ", ExpertsWithoutWorker(), " of ", config_.num_experts,
                        " experts have no live worker", workers,
                        "; retry when the service is ready");
  }
  int loading = 0;
  for (const auto& [stream, session] : membership_.sessions()) {
    loading += session.rank >= 0 && session.state == WorkerState::kLoading;
  }
  if (loading > 0) {
    return absl::StrCat("infer: ", loading, " of ", config_.num_workers,
                        " workers are loading weights; retry when the service is ready");
  }
  return absl::StrCat("infer: no epoch serves yet", workers, "; retry when the service is ready");
}

std::int64_t StateMachine::Impl::PushbackMs() const {
  const std::int64_t drain_us = batch_us_ * queue_.num_queued() / config_.num_slots;
  return std::clamp<std::int64_t>(drain_us / 1000, 10, 5000);
}

std::optional<CompleteRequest> StateMachine::Impl::RefuseAtOnce(const RequestArrived& event) const {
  const auto refuse = [&](absl::StatusCode code, std::string message) {
    return CompleteRequest{event.request, code, std::move(message), -1, 0};
  };
  if (event.num_tokens < 0 || event.num_tokens > config_.max_batch_tokens) {
    return refuse(
        absl::StatusCode::kInvalidArgument,
        absl::StrCat("infer: num_tokens ", event.num_tokens, " is outside [0, max_batch_tokens ",
                     config_.max_batch_tokens, "]; split the request"));
  }
  if (!std::binary_search(config_.layers.begin(), config_.layers.end(), event.layer)) {
    return refuse(absl::StatusCode::kNotFound,
                  absl::StrCat("infer: layer ", event.layer, " is not among the ",
                               config_.layers.size(), " served layers; see ModelMetadata"));
  }
  if (event.deadline_us <= now_us_) {
    return refuse(absl::StatusCode::kDeadlineExceeded,
                  "infer: the deadline passed before the request was queued; allow more time");
  }
  if (!accepting()) return refuse(absl::StatusCode::kUnavailable, WhyNotServing());
  if (event.num_tokens > 0 && QueueIsFull() && !queue_.WhoYieldsTo(event.caller).has_value()) {
    CompleteRequest full =
        refuse(absl::StatusCode::kResourceExhausted,
               absl::StrCat("infer: the queue holds ", queue_.num_queued(), " requests of at most ",
                            config_.queue_capacity, "; retry later or raise --queue-capacity"));
    full.pushback_ms = PushbackMs();
    return full;
  }
  return std::nullopt;
}

void StateMachine::Impl::On(const RequestArrived& event) {
  if (queue_.Contains(event.request)) return Stale();
  if (std::optional<CompleteRequest> refusal = RefuseAtOnce(event)) {
    ++requests_failed_;
    Emit(*std::move(refusal));
  } else if (event.num_tokens == 0) {
    ++requests_ok_;
    Emit(CompleteRequest{event.request, absl::StatusCode::kOk, "", -1, epoch_});
  } else {
    if (QueueIsFull()) TurnAwayFor(event.caller);
    queue_.Push(event, now_us_);
  }
}

bool StateMachine::Impl::QueueIsFull() const {
  return queue_.num_queued() >= config_.queue_capacity;
}

// REQUIRES: somebody yields to `caller`.
void StateMachine::Impl::TurnAwayFor(CallerId caller) {
  const RequestId yields = *queue_.WhoYieldsTo(caller);
  const std::int64_t held = queue_.QueuedOf(queue_.Get(yields).request.caller);
  CompleteRequest full{
      yields, absl::StatusCode::kResourceExhausted,
      absl::StrCat("infer: the queue holds ", config_.queue_capacity, " requests, ", held,
                   " of them of this connection, and another connection's needs a place; retry "
                   "later or raise --queue-capacity"),
      -1, epoch_};
  full.pushback_ms = PushbackMs();
  queue_.Remove(yields);
  ++requests_failed_;
  Emit(std::move(full));
}

void StateMachine::Impl::On(const RequestCancelled& event) {
  if (!queue_.Contains(event.request)) return;
  Complete(event.request, absl::StatusCode::kCancelled, "infer: the caller cancelled");
}

// The caller is answered now; a batch that carries the request runs on without it.
void StateMachine::Impl::Complete(RequestId id, absl::StatusCode code, std::string message) {
  const BatchId batch = queue_.Get(id).batch;
  queue_.Remove(id);
  if (auto it = batches_.find(batch); it != batches_.end()) it->second.DropRequest(id);
  ++requests_failed_;
  Emit(CompleteRequest{id, code, std::move(message), -1, epoch_});
}

void StateMachine::Impl::ExpireRequests() {
  if (now_us_ < queue_.NextRequestDeadline()) return;
  for (const RequestId id : queue_.Expired(now_us_)) {
    const LiveRequest& live = queue_.Get(id);
    const char* where = live.batch == 0 ? " us in the queue" : " us in a batch";
    Complete(id, absl::StatusCode::kDeadlineExceeded,
             absl::StrCat("infer: the deadline passed after ", now_us_ - live.arrived_us, where,
                          "; allow more time"));
  }
}

// ---- starting

int StateMachine::Impl::FreeSlot() const {
  for (int slot = 0; slot < config_.num_slots; ++slot) {
    const bool taken = std::any_of(batches_.begin(), batches_.end(),
                                   [&](const auto& entry) { return entry.second.slot == slot; });
    if (!taken) return slot;
  }
  return -1;
}

std::vector<ShardPlan> StateMachine::Impl::PlanShards(std::int64_t num_tokens) const {
  std::vector<ShardPlan> shards;
  shards.reserve(config_.num_workers);
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    shards.push_back({rank, membership_.AtRank(rank)->stream,
                      runtime::ShardOf(num_tokens, config_.num_workers, rank)});
  }
  return shards;
}

// Few rows are one rank's, which then is the only one that waits for others: on CPUs each message
// and each wait costs more than such rows do. Best the rank's that does most for the first request.
// GPUs' exchanges are in step.
std::optional<int> StateMachine::Impl::SingleSource(const RequestArrived& head, BatchId batch,
                                                    std::int64_t num_tokens) const {
  std::int64_t most_tokens = config_.single_source_tokens;
  if (!head.routed) most_tokens = std::min(most_tokens, kMostRowsRoutedByOne);
  if (num_tokens > most_tokens || membership_.AtRank(0)->backend != "host") return std::nullopt;
  const int rank = head.rank_of_most_experts;
  if (rank >= 0 && rank < config_.num_workers) return rank;
  return static_cast<int>(batch % static_cast<BatchId>(config_.num_workers));
}

std::vector<ShardPlan> StateMachine::Impl::PlanSingleSource(std::int64_t num_tokens,
                                                            int source) const {
  std::vector<ShardPlan> shards = PlanShards(0);
  for (ShardPlan& shard : shards) {
    shard.rows.begin = shard.rank > source ? num_tokens : 0;
    shard.rows.end = shard.rank >= source ? num_tokens : 0;
  }
  return shards;
}

CountExchange StateMachine::Impl::ExchangeFor(bool routed, bool single_source) const {
  if (config_.count_exchange == CountExchangeMode::kDevice) return CountExchange::kDevice;
  if (routed) return CountExchange::kCoordinator;
  // A single source's counts reach its peers with their shards.
  if (config_.count_exchange == CountExchangeMode::kCoordinator || single_source) {
    return CountExchange::kStreams;
  }
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    if (!membership_.AtRank(rank)->device_counts) return CountExchange::kStreams;
  }
  return CountExchange::kDevice;
}

void StateMachine::Impl::StartProbeBatch() {
  Batch batch(next_batch_++, FreeSlot(), config_.num_workers, now_us_);
  const std::int64_t num_tokens =
      std::min<std::int64_t>(std::max(2 * config_.num_workers, 2), config_.max_batch_tokens);
  batch.probe = true;
  batch.exchange = ExchangeFor(/*routed=*/true, /*single_source=*/false);
  batch.shards = PlanShards(num_tokens);
  Emit(StartProbe{epoch_, batch.id, batch.slot, config_.layers.front(), num_tokens, batch.shards,
                  config_.trigger, batch.exchange});
  if (config_.trigger == TriggerMode::kSeparate) {
    Emit(SendDispatchTrigger{epoch_, batch.id, batch.Streams()});
  }
  batches_.emplace(batch.id, std::move(batch));
}

// A batch of few rows on CPUs, of the kind that is next, which by the batches before is over in
// about the time that its messages take.
bool StateMachine::Impl::SmallBatchRuns() const {
  if (membership_.AtRank(0)->backend != "host" || batch_us_ > kShortBatchUs) return false;
  const std::optional<RequestKind> next = queue_.NextKind();
  return std::any_of(batches_.begin(), batches_.end(), [&](const auto& entry) {
    const Batch& batch = entry.second;
    return !batch.failed && !batch.probe && batch.kind == next &&
           batch.shards.back().rows.end <= server::kSmallBatchRows;
  });
}

// Requests that share a batch share what it costs, so that fewer and fuller ones do more. So a
// batch starts once all that has come for the host is in the queue, which it tells before it would
// sleep; while nothing is in flight, also at the first event after the oldest has waited for a
// moment. Beside a small batch none of its kind is started: it is over soon, and the workers would
// have to wake other threads for the second.
bool StateMachine::Impl::MayStartBatch() const {
  if (stage_ != Stage::kServing || hold_until_us_ != kNever) return false;
  if (!queue_.merges_at_once()) return true;
  if (input_taken_) return !SmallBatchRuns();
  if (!batches_.empty()) return false;
  return !config_.input_is_told || now_us_ - queue_.NextPick() >= kMostGatherUs;
}

bool StateMachine::Impl::WantsInputTaken() const {
  return stage_ == Stage::kServing && hold_until_us_ == kNever && !MayStartBatch() &&
         queue_.num_queued() > 0 && FreeSlot() >= 0 && !SmallBatchRuns();
}

void StateMachine::Impl::PumpQueue() {
  const bool flush = epoch_closing_ || cluster_draining_;
  while (MayStartBatch()) {
    const int slot = FreeSlot();
    if (slot < 0) return;
    const std::vector<RequestId> picked = queue_.Pick(next_batch_, now_us_, flush);
    if (picked.empty()) return;
    Batch batch(next_batch_++, slot, config_.num_workers, now_us_);
    const RequestArrived head = queue_.Get(picked.front()).request;
    std::int64_t num_tokens = 0;
    for (const RequestId id : picked) {
      const std::int64_t end = num_tokens + queue_.Get(id).request.num_tokens;
      batch.requests.push_back({id, {num_tokens, end}});
      num_tokens = end;
    }
    batch.kind = KindOf(head);
    const std::optional<int> source = SingleSource(head, batch.id, num_tokens);
    batch.exchange = ExchangeFor(head.routed && !head.ids_hidden, source.has_value());
    batch.shards = source ? PlanSingleSource(num_tokens, *source) : PlanShards(num_tokens);
    const bool counts_follow = batch.exchange == CountExchange::kStreams;
    if (source && counts_follow) batch.ExpectCountsOf(*source);
    Emit(StartBatch{epoch_, batch.id, slot, head.layer, head.row_type, head.routed, num_tokens,
                    batch.requests, batch.shards, config_.trigger, batch.exchange,
                    source.has_value()});
    if (!counts_follow && config_.trigger == TriggerMode::kSeparate) {
      Emit(SendDispatchTrigger{epoch_, batch.id, batch.Streams()});
    }
    batches_.emplace(batch.id, std::move(batch));
  }
}

// ---- holding

void StateMachine::Impl::On(const HoldBatches& event) {
  hold_until_us_ = event.until_us;
  most_held_us_ = event.most_held_us;
  hold_answered_ = false;
}

void StateMachine::Impl::On(const ReleaseBatches&) { hold_until_us_ = kNever; }

void StateMachine::Impl::AdvanceHold() {
  if (hold_until_us_ == kNever) return;
  if (now_us_ >= hold_until_us_) {
    hold_until_us_ = kNever;
    Emit(BatchesHeld{/*expired=*/true});
  } else if (!hold_answered_ && batches_.empty()) {
    hold_answered_ = true;
    if (hold_until_us_ - now_us_ > most_held_us_) hold_until_us_ = now_us_ + most_held_us_;
    Emit(BatchesHeld{});
  }
}

// ---- what workers say

Batch* StateMachine::Impl::BatchOf(EpochId epoch, BatchId batch) {
  if (!epoch_runs() || epoch != epoch_) return nullptr;
  const auto it = batches_.find(batch);
  return it == batches_.end() ? nullptr : &it->second;
}

void StateMachine::Impl::On(const Counts& event) {
  Session* session = membership_.Find(event.stream);
  Batch* batch = BatchOf(event.epoch, event.batch);
  if (session == nullptr || batch == nullptr || !IsMember(*session) ||
      batch->exchange != CountExchange::kStreams || batch->counted.Has(session->rank)) {
    return Stale();
  }
  absl::Status status = batch->AddCounts(session->rank, event, placement_, config_.topk);
  if (status.ok()) {
    batch->counted.Insert(session->rank);
    if (!batch->counted.Full()) return;
    status = runtime::ValidateCountMatrix(batch->counts, placement_, config_.max_batch_tokens);
  }
  if (!status.ok()) {
    const std::string message = absl::StrCat(session->Name(), ": ", std::string(status.message()));
    FailBatch(*batch, absl::StatusCode::kInternal, absl::StrCat("infer: ", message));
    EndEpoch(message);
    return;
  }
  Emit(SendCountMatrix{epoch_, batch->id, batch->counts, batch->Streams()});
  if (config_.trigger == TriggerMode::kSeparate) {
    Emit(SendDispatchTrigger{epoch_, batch->id, batch->Streams()});
  }
}

void StateMachine::Impl::On(const PhaseDone& event) {
  Session* session = membership_.Find(event.stream);
  Batch* batch = BatchOf(event.epoch, event.batch);
  if (session == nullptr || batch == nullptr || !IsMember(*session) ||
      config_.trigger != TriggerMode::kSeparate) {
    return Stale();
  }
  if (event.phase != Phase::kDispatch) return;  // BatchDone says the rest.
  if (!batch->dispatched.Insert(session->rank)) return Stale();
  if (batch->dispatched.Full()) {
    Emit(SendCombineTrigger{epoch_, batch->id, batch->Streams()});
  }
}

void StateMachine::Impl::On(const BatchDone& event) {
  Session* session = membership_.Find(event.stream);
  Batch* batch = BatchOf(event.epoch, event.batch);
  if (session == nullptr || batch == nullptr || !IsMember(*session) ||
      !batch->done.Insert(session->rank)) {
    return Stale();
  }
  if (event.code != absl::StatusCode::kOk) {
    const std::string message =
        absl::StrCat(session->Name(), " failed batch ", event.batch, ": ",
                     absl::StatusCodeToString(event.code), ": ", event.message);
    Log(Notice::Level::kError, "batch_failed", {{"epoch", epoch_}, {"message", message}});
    if (batch->probe) BackOff();
    if (batch->probe || EndsEpoch(event.code)) return EndEpoch(message);
    FailBatch(*batch, absl::StatusCode::kInternal, absl::StrCat("infer: ", message));
  }
  if (!batch->probe) ++session->batches;
  if (batch->done.Full()) RetireBatch(*batch);
}

void StateMachine::Impl::RetireBatch(Batch& batch) {
  const BatchId id = batch.id;
  if (batch.probe) {
    probe_answered_ = true;
    Emit(VerifyProbe{epoch_, id});
  } else if (batch.failed) {
    Emit(DropBatch{epoch_, id});
  } else {
    const std::int64_t took_us = now_us_ - batch.started_us;
    batch_us_ = batch_us_ == 0 ? took_us : (7 * batch_us_ + took_us) / 8;
    requests_ok_ += batch.requests.size();
    for (const RequestRows& rows : batch.requests) queue_.Remove(rows.request);
    Emit(FinishBatch{epoch_, id, std::move(batch.requests)});
  }
  batches_.erase(id);
}

// ---- failing

// The requests end now. The slot stays taken: the other ranks still work on the batch, or wait in
// it for the one that failed, in which case the epoch must end to free them.
void StateMachine::Impl::FailBatch(Batch& batch, absl::StatusCode code,
                                   const std::string& message) {
  if (!batch.failed) {
    batch.failed = true;
    batch.failed_until_us = now_us_ + config_.lease_us;
    batch.failure = message;
  }
  for (const RequestRows& rows : std::exchange(batch.requests, {})) {
    Complete(rows.request, code, message);
  }
}

void StateMachine::Impl::DropAllWork(const std::string& message) {
  for (auto& [id, batch] : batches_) {
    for (const RequestRows& rows : std::exchange(batch.requests, {})) {
      Complete(rows.request, absl::StatusCode::kUnavailable, message);
    }
    Emit(DropBatch{epoch_, id});
  }
  batches_.clear();
  for (const RequestId id : queue_.Queued()) {
    Complete(id, absl::StatusCode::kUnavailable, message);
  }
}

std::string StateMachine::Impl::WaitedFor(const Batch& batch) const {
  const bool counting = batch.exchange == CountExchange::kStreams && !batch.counted.Full();
  const bool dispatching =
      !counting && config_.trigger == TriggerMode::kSeparate && !batch.dispatched.Full();
  std::vector<std::string> names;
  for (int rank = 0; rank < config_.num_workers; ++rank) {
    const RankSet& heard = counting ? batch.counted : dispatching ? batch.dispatched : batch.done;
    if (!heard.Has(rank)) names.push_back(membership_.AtRank(rank)->Name());
  }
  const char* what = counting ? " to count" : dispatching ? " to dispatch" : " to finish";
  return absl::StrCat(absl::StrJoin(names, ", "), what);
}

void StateMachine::Impl::ExpireBatches() {
  for (const auto& [id, batch] : batches_) {
    if (now_us_ >= batch.failed_until_us) {
      EndEpoch(absl::StrCat("batch ", id, " failed and waited for ", WaitedFor(batch), " (",
                            batch.failure, ")"));
      return;
    }
    if (!batch.probe && now_us_ >= batch.started_us + config_.batch_timeout_us) {
      EndEpoch(absl::StrCat("batch ", id, " waited for ", WaitedFor(batch), " for ",
                            config_.batch_timeout_us / 1000, " ms"));
      return;
    }
  }
}

TimeUs StateMachine::Impl::NextBatchDeadline() const {
  TimeUs next_us = kNever;
  for (const auto& [id, batch] : batches_) {
    next_us = std::min(next_us, batch.failed_until_us);
    if (!batch.probe) next_us = std::min(next_us, batch.started_us + config_.batch_timeout_us);
  }
  if (hold_until_us_ != kNever) return std::min(next_us, hold_until_us_);
  if (MayStartBatch() && FreeSlot() >= 0) next_us = std::min(next_us, queue_.NextPick());
  return next_us;
}

}  // namespace epserve::coordinator
