#include "tests/server/coordinator/state_machine/simulation/sim_coordinator.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <variant>

namespace epserve::coordinator::sim {
namespace {

const char* const kEventNames[] = {
    "WorkerHello",      "WorkerLoadProgress", "WorkerLoaded",  "HeapCreated",  "PeersOpened",
    "EpochQuiesced",    "Heartbeat",          "Counts",        "PhaseDone",    "BatchDone",
    "WorkerLeaving",    "WorkerFailure",      "StreamClosed",  "ProcessEnded", "RequestArrived",
    "RequestCancelled", "InputTaken",         "ProbeVerified", "DrainWorker",  "DrainCluster",
    "HoldBatches",      "ReleaseBatches",     "Tick"};
static_assert(std::size(kEventNames) == std::variant_size_v<Event>);
const char* const kCommandNames[] = {
    "AssignRank",       "SendStandby",         "SendCreateHeap",     "SendOpenPeers",
    "SendEpochStarted", "SendEpochEnded",      "GrantLease",         "SendShutdown",
    "RejectWorker",     "CloseStream",         "StartProbe",         "StartBatch",
    "SendCountMatrix",  "SendDispatchTrigger", "SendCombineTrigger", "VerifyProbe",
    "FinishBatch",      "DropBatch",           "CompleteRequest",    "SetServing",
    "BatchesHeld",      "DrainWorkerDone",     "ClusterDrained",     "Notice"};

}  // namespace

SimCoordinator::SimCoordinator(World& world, Network& network, const Config& config, int life)
    : world_(world), network_(network), config_(config), life_(life), machine_(config) {}

// ---- the host

void SimCoordinator::Stall(std::int64_t duration_us) {
  world_.Trace(absl::StrCat("the coordinator stalls for ", duration_us));
  stalled_until_us_ = std::max(stalled_until_us_, world_.now() + duration_us);
}

void SimCoordinator::Deliver(const Event& event) {
  if (dead_) return;
  if (world_.now() >= stalled_until_us_) return Apply(event);
  world_.At(stalled_until_us_, [this, event] { Deliver(event); });
}

void SimCoordinator::Apply(const Event& event) {
  if (world_.tracing()) world_.Trace(absl::StrCat("event ", kEventNames[event.index()]));
  Note(event);
  for (const Command& command : machine_.Apply(event, world_.now())) {
    if (world_.tracing()) {
      world_.Trace(absl::StrCat("  command ", kCommandNames[command.index()]));
    }
    std::visit([this](const auto& c) { On(c); }, command);
  }
  if (static_cast<std::int64_t>(queued_.size()) > config_.queue_capacity) {
    world_.Fail(absl::StrCat(queued_.size(), " requests are queued"));
  }
  if (static_cast<int>(batches_.size()) > config_.num_slots) {
    world_.Fail(absl::StrCat(batches_.size(), " batches are in flight"));
  }
  if (std::holds_alternative<Tick>(event) && machine_.NextDeadline() &&
      *machine_.NextDeadline() <= world_.now()) {
    world_.Fail("a Tick left its deadline standing");
  }
  // Whoever takes in the events finds nothing more of them, now or after a while.
  if (machine_.WantsInputTaken() && !input_is_told_) {
    input_is_told_ = true;
    world_.At(world_.now() + world_.Between(0, 2 * kMs), [this] {
      input_is_told_ = false;
      Deliver(InputTaken{});
    });
  }
  if (std::holds_alternative<InputTaken>(event) && machine_.WantsInputTaken()) {
    world_.Fail("InputTaken left requests that want it");
  }
  ArmTick();
}

void SimCoordinator::Note(const Event& event) {
  if (const auto* hello = std::get_if<WorkerHello>(&event)) {
    streams_[hello->stream] = {std::stoi(hello->incarnation)};
  } else if (const auto* closed = std::get_if<StreamClosed>(&event)) {
    streams_.erase(closed->stream);
  } else if (const auto* quiesced = std::get_if<EpochQuiesced>(&event)) {
    const auto it = streams_.find(quiesced->stream);
    if (it != streams_.end() && it->second.epoch == quiesced->epoch) {
      it->second.quiesced = true;
      it->second.ended_epoch = quiesced->epoch;
    }
  } else if (const auto* arrived = std::get_if<RequestArrived>(&event)) {
    inbox_.erase(arrived->request);
    queued_.insert(arrived->request);
  } else if (const auto* verified = std::get_if<ProbeVerified>(&event)) {
    if (verified->ok) verified_epoch_ = verified->epoch;
  } else if (const auto* hold = std::get_if<HoldBatches>(&event)) {
    hold_until_us_ = hold->until_us;
  } else if (std::holds_alternative<ReleaseBatches>(event)) {
    held_ = false;
  }
}

void SimCoordinator::ArmTick() {
  const std::optional<TimeUs> due_us = machine_.NextDeadline();
  if (!due_us || *due_us >= armed_us_) return;
  armed_us_ = std::max(*due_us, world_.now());
  const TimeUs late_us = world_.Fault(0.05) ? world_.Between(0, 5 * kMs) : 0;
  world_.At(armed_us_ + late_us, [this] { Wake(); });
}

void SimCoordinator::Wake() {
  if (dead_) return;
  if (world_.now() < stalled_until_us_) {
    world_.At(stalled_until_us_, [this] { Wake(); });
    return;
  }
  armed_us_ = kNever;
  const std::optional<TimeUs> due_us = machine_.NextDeadline();
  if (due_us && *due_us <= world_.now()) return Apply(Tick{});
  ArmTick();
}

RequestId SimCoordinator::Arrive(RequestArrived request) {
  request.request = world_.next_request++;
  world_.requests[request.request] = {};
  inbox_.insert(request.request);
  Deliver(request);
  return request.request;
}

void SimCoordinator::Drain(const std::string& worker_id) {
  drain_tokens_.insert(next_token_);
  Deliver(DrainWorker{worker_id, next_token_++});
}

void SimCoordinator::Die() {
  world_.Trace("the coordinator dies");
  dead_ = true;
  for (const auto* requests : {&inbox_, &queued_, &in_flight_}) {
    for (const RequestId id : *requests) world_.EndRequest(id, false);
  }
  network_.BreakAllOf(life_);
}

// ---- what a command must hold to

bool SimCoordinator::MayGo(StreamId stream, EpochId epoch) {
  const auto it = streams_.find(stream);
  if (it == streams_.end()) {
    world_.Fail(absl::StrCat("a message went to stream ", stream, ", which is closed"));
    return false;
  }
  if (epoch == 0) return true;
  if (epoch != it->second.epoch || epoch <= it->second.ended_epoch) {
    world_.Fail(absl::StrCat("a message of epoch ", epoch, " went to stream ", stream, " of epoch ",
                             it->second.epoch, ", ended ", it->second.ended_epoch));
    return false;
  }
  return true;
}

void SimCoordinator::On(const AssignRank& c) {
  if (c.placement.num_ranks() != config_.num_workers) world_.Fail("wrong placement");
  Forward(c, 0);
}

void SimCoordinator::On(const SendCreateHeap& c) {
  if (c.epoch != epoch_) {
    if (c.epoch <= world_.newest_epoch) {
      world_.Fail(absl::StrCat("epoch ", c.epoch, " follows ", world_.newest_epoch));
    }
    world_.newest_epoch = epoch_ = c.epoch;
    last_batch_ = 0;
    if (!batches_.empty()) world_.Fail("batches outlived their epoch");
    world_.Trace(absl::StrCat("epoch ", c.epoch));
  }
  const auto it = streams_.find(c.stream);
  if (it == streams_.end()) return world_.Fail("CreateHeap went to a closed stream");
  if (!it->second.quiesced) world_.Fail("CreateHeap went to a worker that has not quiesced");
  it->second.epoch = c.epoch;
  it->second.quiesced = false;
  world_.members[c.epoch].push_back(it->second.process);
  world_.newest_epoch_of_process[it->second.process] = c.epoch;
  Forward(c, c.epoch);
}

void SimCoordinator::On(const SendEpochEnded& c) {
  Forward(c, c.epoch);
  if (auto it = streams_.find(c.stream); it != streams_.end()) it->second.ended_epoch = c.epoch;
}

void SimCoordinator::On(const RejectWorker& c) {
  world_.Fail(absl::StrCat("a sound worker was rejected: ", c.message));
}

void SimCoordinator::On(const CloseStream& c) {
  if (streams_.erase(c.stream) == 0) world_.Fail("a closed stream was closed");
  network_.Break(c.stream);
}

// ---- batches

void SimCoordinator::TakeSlot(BatchId batch, int slot, bool probe, EpochId epoch,
                              CountExchange counts) {
  if (epoch != epoch_) world_.Fail("a batch started in an epoch that is not the newest");
  if (batch <= last_batch_) world_.Fail(absl::StrCat("batch ", batch, " follows ", last_batch_));
  last_batch_ = batch;
  if (slot < 0 || slot >= config_.num_slots) world_.Fail(absl::StrCat("slot ", slot));
  for (const auto& [other, in_flight] : batches_) {
    if (in_flight.slot == slot) {
      world_.Fail(absl::StrCat("batches ", other, " and ", batch, " share slot ", slot));
    }
  }
  batches_[batch] = {.slot = slot, .probe = probe, .counts = counts};
}

CountExchange SimCoordinator::ExpectedCounts(bool routed, bool single_source) const {
  switch (config_.count_exchange) {
    case CountExchangeMode::kDevice:
      return CountExchange::kDevice;
    case CountExchangeMode::kCoordinator:
      return routed ? CountExchange::kCoordinator : CountExchange::kStreams;
    case CountExchangeMode::kAuto:
      break;
  }
  if (routed) return CountExchange::kCoordinator;
  if (single_source) return CountExchange::kStreams;
  const std::vector<int>& members = world_.members.at(epoch_);
  const bool all = std::all_of(members.begin(), members.end(), [this](int process) {
    return world_.offers_device_counts.at(process);
  });
  return all ? CountExchange::kDevice : CountExchange::kStreams;
}

template <typename T>
void SimCoordinator::SendShards(const T& start, bool routed, bool single_source) {
  const CountExchange expected = ExpectedCounts(routed, single_source);
  if (start.counts != expected) {
    world_.Fail(absl::StrCat("a batch is counted by ", CountExchangeName(start.counts), ", not by ",
                             CountExchangeName(expected)));
  }
  std::int64_t next = 0;
  int sources = 0;
  for (const ShardPlan& shard : start.shards) {
    if (shard.rows.begin != next) world_.Fail("shards do not follow one another");
    next = shard.rows.end;
    sources += shard.rows.size() > 0;
    ShardMessage message{start.epoch,   start.batch,       start.slot,
                         start.trigger, shard.rows.size(), start.counts};
    if (single_source && start.counts == CountExchange::kStreams && shard.rows.size() == 0) {
      batches_[start.batch].held_back[shard.stream] = message;
    } else if (MayGo(shard.stream, start.epoch)) {
      network_.ToWorkerEnd(shard.stream, message);
    } else {
      return;
    }
  }
  if (single_source && sources != 1) world_.Fail("a single source is none");
  if (next != start.num_tokens || next > config_.max_batch_tokens) world_.Fail("wrong shards");
}

void SimCoordinator::On(const StartProbe& c) {
  TakeSlot(c.batch, c.slot, true, c.epoch, c.counts);
  SendShards(c, true, false);
}

void SimCoordinator::On(const StartBatch& c) {
  if (verified_epoch_ != c.epoch) world_.Fail("a batch started in an unverified epoch");
  if (held_) world_.Fail("a batch started while batches are held");
  TakeSlot(c.batch, c.slot, false, c.epoch, c.counts);
  std::int64_t next = 0;
  for (const RequestRows& rows : c.requests) {
    if (queued_.erase(rows.request) == 0) {
      world_.Fail(absl::StrCat("request ", rows.request, " was not queued"));
    }
    if (rows.rows.begin != next || rows.rows.size() <= 0) world_.Fail("wrong rows of a request");
    next = rows.rows.end;
    in_flight_.insert(rows.request);
    batches_[c.batch].requests.insert(rows.request);
  }
  if (next != c.num_tokens) world_.Fail("requests do not fill their batch");
  SendShards(c, c.routed, c.single_source);
}

void SimCoordinator::On(const SendCountMatrix& c) {
  const auto it = batches_.find(c.batch);
  if (it == batches_.end() || it->second.counts != CountExchange::kStreams) {
    return world_.Fail(absl::StrCat("a count matrix went out for batch ", c.batch));
  }
  std::map<StreamId, ShardMessage> held = std::exchange(it->second.held_back, {});
  for (const StreamId stream : c.streams) {
    if (!MayGo(stream, c.epoch)) continue;
    if (const auto shard = held.find(stream); shard != held.end()) {
      shard->second.counts = CountExchange::kCoordinator;  // They come along, as from there.
      network_.ToWorkerEnd(stream, shard->second);
      held.erase(shard);
    } else {
      network_.ToWorkerEnd(stream, MatrixMessage{c.epoch, c.batch});
    }
  }
  if (!held.empty()) world_.Fail("the counts did not go to all that wait for their shards");
}

void SimCoordinator::On(const SendDispatchTrigger& c) {
  for (const StreamId stream : c.streams) {
    if (MayGo(stream, c.epoch)) network_.ToWorkerEnd(stream, DispatchMessage{c.epoch, c.batch});
  }
}

void SimCoordinator::On(const SendCombineTrigger& c) {
  for (const StreamId stream : c.streams) {
    if (MayGo(stream, c.epoch)) network_.ToWorkerEnd(stream, CombineMessage{c.epoch, c.batch});
  }
}

// A result is a result only if every rank of this epoch truly made its rows.
void SimCoordinator::CheckAllDone(EpochId epoch, BatchId batch) {
  if (static_cast<int>(world_.done_ok[{epoch, batch}].size()) != config_.num_workers) {
    world_.Fail(absl::StrCat("batch ", batch, " of epoch ", epoch,
                             " was taken as done, but not every rank has done it"));
  }
}

void SimCoordinator::FreeBatch(EpochId epoch, BatchId batch, bool probe) {
  const auto it = batches_.find(batch);
  if (epoch != epoch_ || it == batches_.end() || it->second.probe != probe) {
    return world_.Fail(absl::StrCat("batch ", batch, " of epoch ", epoch, " ended unknown"));
  }
  batches_.erase(it);
}

void SimCoordinator::On(const VerifyProbe& c) {
  CheckAllDone(c.epoch, c.batch);
  FreeBatch(c.epoch, c.batch, true);
  const bool wrong = world_.Fault(0.05);
  world_.At(world_.now() + world_.Between(0, 300), [this, epoch = c.epoch, wrong] {
    Deliver(ProbeVerified{epoch, !wrong, wrong ? "off" : ""});
  });
}

void SimCoordinator::On(const FinishBatch& c) {
  CheckAllDone(c.epoch, c.batch);
  if (const auto it = batches_.find(c.batch); it != batches_.end()) {
    ++world_.batches_finished[it->second.counts];
  }
  FreeBatch(c.epoch, c.batch, false);
  for (const RequestRows& rows : c.requests) {
    if (in_flight_.erase(rows.request) == 0) world_.Fail("a finished request was not in flight");
    world_.EndRequest(rows.request, true);
  }
}

void SimCoordinator::On(const DropBatch& c) {
  const auto it = batches_.find(c.batch);
  if (it == batches_.end()) return world_.Fail("a dropped batch is unknown");
  for (const RequestId id : it->second.requests) {
    if (in_flight_.contains(id))
      world_.Fail(absl::StrCat("request ", id, " was dropped unanswered"));
  }
  FreeBatch(c.epoch, c.batch, it->second.probe);
}

void SimCoordinator::On(const CompleteRequest& c) {
  if (queued_.erase(c.request) + in_flight_.erase(c.request) != 1) {
    world_.Fail(absl::StrCat("request ", c.request, " was completed, but is not live"));
  }
  if (c.code != absl::StatusCode::kOk && c.message.empty()) world_.Fail("an empty error message");
  world_.EndRequest(c.request, c.code == absl::StatusCode::kOk);
}

void SimCoordinator::On(const SetServing& c) {
  if (c.serving == serving_) world_.Fail("readiness did not change");
  if (c.serving && (verified_epoch_ != c.epoch || c.epoch != epoch_)) {
    world_.Fail(absl::StrCat("epoch ", c.epoch, " serves unverified"));
  }
  serving_ = c.serving;
}

void SimCoordinator::Hold(std::int64_t duration_us) {
  Deliver(HoldBatches{world_.now() + duration_us});
  world_.At(world_.now() + world_.Between(0, 2 * duration_us),
            [this] { Deliver(ReleaseBatches{}); });
}

void SimCoordinator::On(const BatchesHeld& c) {
  if (!c.expired && !batches_.empty()) world_.Fail("batches are held with one in flight");
  if (c.expired && world_.now() < hold_until_us_) world_.Fail("a hold ended before its time");
  held_ = !c.expired;
}

void SimCoordinator::On(const DrainWorkerDone& c) {
  if (drain_tokens_.erase(c.token) == 0) world_.Fail("a drain was answered twice");
}

void SimCoordinator::On(const ClusterDrained&) {
  if (drained_) world_.Fail("drained twice");
  if (!queued_.empty() || !in_flight_.empty() || !batches_.empty())
    world_.Fail("drained with work left");
  drained_ = true;
}

void SimCoordinator::On(const Notice& c) {
  if (!world_.tracing()) return;
  std::string line = absl::StrCat("  ", c.event);
  for (const NoticeField& field : c.fields) {
    std::visit([&](const auto& value) { absl::StrAppend(&line, " ", field.key, "=", value); },
               field.value);
  }
  world_.Trace(line);
}

}  // namespace epserve::coordinator::sim
