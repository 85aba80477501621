// How the host carries out each command of the state machine. All in the host's turn.
#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "server/common/probe.h"
#include "server/coordinator/host.h"
#include "server/coordinator/state_machine/batch.h"

namespace epserve::coordinator {
namespace {

constexpr double kSecondsPerNs = 1e-9;
constexpr double kSecondsPerUs = 1e-6;

runtime::LogLevel LogLevelOf(Notice::Level level) {
  switch (level) {
    case Notice::Level::kInfo:
      return runtime::LogLevel::kInfo;
    case Notice::Level::kWarning:
      return runtime::LogLevel::kWarning;
    case Notice::Level::kError:
      return runtime::LogLevel::kError;
  }
  return runtime::LogLevel::kError;
}

// The outputs of a probe (fp32 rows) in one piece.
absl::StatusOr<std::vector<float>> JoinProbeOutput(const KeptBatch& batch) {
  std::vector<float> output(batch.probe.hidden.size());
  const std::span<char> bytes(reinterpret_cast<char*>(output.data()),
                              output.size() * sizeof(float));
  const absl::Status status = CopyOutput(batch, {0, batch.probe.num_tokens}, bytes);
  if (!status.ok()) return status;
  return output;
}

}  // namespace

void Host::Send(StreamId stream, StreamMessage message) {
  const auto it = streams_.find(stream);
  if (it != streams_.end()) it->second.stream->Send(std::move(message));
}

void Host::SendShards(const std::vector<ShardPlan>& plans, std::vector<ShardMessage> shards) {
  for (std::size_t i = 0; i < plans.size(); ++i) Send(plans[i].stream, std::move(shards[i]));
}

template <typename StreamCommand>
void Host::Execute(StreamCommand& command) {
  const StreamId stream = command.stream;
  Send(stream, std::move(command));
}
template void Host::Execute(SendStandby&);
template void Host::Execute(SendOpenPeers&);
template void Host::Execute(GrantLease&);
template void Host::Execute(SendShutdown&);

void Host::Execute(AssignRank& command) {
  const auto it = streams_.find(command.stream);
  if (it == streams_.end()) return;
  it->second.rank = command.rank;
  it->second.stream->Send(std::move(command));
}

// Without one the rows travel in the messages; the log says so.
void Host::OpenArena(EpochId epoch) {
  arena_epoch_ = epoch;
  arena_handle_.clear();
  if (!row_transport_.shared) return;
  runtime::RowArenaSpec spec;
  spec.cluster_id = row_transport_.cluster_id;
  spec.epoch = epoch;
  spec.num_slots = config_.num_slots;
  spec.max_batch_tokens = config_.max_batch_tokens;
  spec.hidden = hidden_;
  spec.topk = config_.topk;
  absl::StatusOr<std::shared_ptr<runtime::RowArena>> arena = runtime::RowArena::Create(spec);
  if (!arena.ok()) {
    runtime::LogWarning("row_arena_unavailable",
                        {{"epoch", epoch},
                         {"error", arena.status()},
                         {"effect", "rows travel within messages, which is slower"}});
    return;
  }
  arena_handle_ = (*arena)->handle();
  batches_->OpenArena(
      epoch, std::make_shared<RowBlocks>(*std::move(arena), config_.num_slots, row_lender_));
}

void Host::Execute(SendCreateHeap& command) {
  if (command.epoch != arena_epoch_) OpenArena(command.epoch);
  const auto it = streams_.find(command.stream);
  if (it != streams_.end()) it->second.heap_epoch = command.epoch;
  Send(command.stream,
       CreateHeapMessage{command.epoch, arena_handle_,
                         arena_handle_.empty() ? RegionAccess() : row_transport_.regions,
                         device_regions_.JoinEpoch(command.epoch, command.stream)});
}

void Host::Execute(SendEpochStarted& command) {
  batches_->SealArena(command.epoch);
  Send(command.stream, std::move(command));
}

void Host::EndHeap(StreamId stream, EpochId epoch) {
  const auto it = streams_.find(stream);
  if (it == streams_.end() || it->second.heap_epoch != epoch) return;
  it->second.heap_epoch = 0;
  it->second.handle_type.reset();
  CountHeaps();
}

void Host::Execute(SendEpochEnded& command) {
  batches_->CloseArena(command.epoch);
  EndHeap(command.stream, command.epoch);
  Send(command.stream, std::move(command));
}

void Host::Execute(RejectWorker& command) {
  const auto it = streams_.find(command.stream);
  if (it == streams_.end()) return;
  const absl::Status reason(command.code, command.message);
  if (hooks_.on_worker_refused) {
    hooks_.on_worker_refused(it->second.hello, reason, /*comes_back=*/false);
  }
  it->second.stream->Send(std::move(command));
  it->second.stream->Close(reason, /*flush=*/true);
}

void Host::Execute(CloseStream& command) {
  const auto it = streams_.find(command.stream);
  if (it == streams_.end()) return;
  const absl::Status reason = absl::AbortedError(absl::StrCat("control: ", command.reason));
  if (command.turned_away && hooks_.on_worker_refused) {
    hooks_.on_worker_refused(it->second.hello, reason, /*comes_back=*/true);
  }
  it->second.stream->Close(reason, /*flush=*/false);
  LeaveRegions(command.stream);
  EraseStream(command.stream);
}

void Host::Execute(StartProbe& command) {
  SendShards(command.shards, batches_->Start(command, NowUs()));
}

void Host::Execute(StartBatch& command) {
  std::vector<const ValidatedRequest*> requests;
  for (const RequestRows& part : command.requests) {
    const auto it = requests_.find(part.request);
    if (it == requests_.end()) {
      runtime::LogError("batch_without_request", {{"request", part.request}});
      return;
    }
    requests.push_back(&it->second.pending->request);
  }
  std::vector<ShardMessage> shards = batches_->Start(command, requests, NowUs());
  std::vector<int> order = SendingOrder(command.shards);
  // Where the ranks are to count first, those that have rows to count are waited for.
  if (command.counts != CountExchange::kCoordinator) std::reverse(order.begin(), order.end());
  const bool holds_back = command.single_source && command.counts == CountExchange::kStreams;
  for (const int rank : order) {
    const ShardPlan& plan = command.shards[rank];
    ShardMessage& shard = shards[rank];
    if (holds_back && plan.rows.size() == 0) {
      batches_->HoldBack(command.epoch, command.batch, plan, std::move(shard));
    } else {
      SendShard(plan, std::move(shard));
    }
  }
}

void Host::SendShard(const ShardPlan& plan, ShardMessage shard) {
  if (TakesPart(shard, plan)) return Send(plan.stream, std::move(shard));
  raised_.push_back(BatchDone{plan.stream, shard.epoch, shard.batch});
}

// A batch of few tokens has no rows for most workers. Those on CPUs have then nothing to do in it:
// rows go from one worker to another, and no third is waited for. GPUs' exchanges are in step.
bool Host::TakesPart(const ShardMessage& shard, const ShardPlan& plan) const {
  const bool counted = shard.counts != nullptr && shard.trigger == TriggerMode::kTogether;
  if (!counted || shard.num_tokens > 0) return true;
  for (int source = 0; source < config_.num_workers; ++source) {
    if (shard.counts->at(source, plan.rank) > 0) return true;
  }
  const auto it = streams_.find(plan.stream);
  return it == streams_.end() || it->second.hello.backend != "host";
}

void Host::Execute(SendCountMatrix& command) {
  const auto counts = std::make_shared<const runtime::CountMatrix>(std::move(command.counts));
  std::vector<HeldShard> held = batches_->TakeHeldBack(command.epoch, command.batch);
  for (const StreamId stream : command.streams) {
    const bool told = std::any_of(held.begin(), held.end(), [stream](const HeldShard& shard) {
      return shard.plan.stream == stream;
    });
    if (!told) Send(stream, CountMatrixMessage{command.epoch, command.batch, counts});
  }
  // The source's peers wait for its rows.
  for (HeldShard& shard : held) {
    shard.message.counts = counts;
    SendShard(shard.plan, std::move(shard.message));
  }
}

void Host::Execute(SendDispatchTrigger& command) {
  for (StreamId stream : command.streams) {
    Send(stream, DispatchTriggerMessage{command.epoch, command.batch});
  }
}

void Host::Execute(SendCombineTrigger& command) {
  for (StreamId stream : command.streams) {
    Send(stream, CombineTriggerMessage{command.epoch, command.batch});
  }
}

void Host::Execute(VerifyProbe& command) {
  absl::Status verdict = absl::InternalError("probe: its batch is not known");
  if (const KeptBatch* batch = batches_->Find(command.epoch, command.batch)) {
    std::vector<std::vector<float>> references(batch->shards.size());
    double tolerance = server::ProbeTolerance("host");
    for (const ShardPlan& plan : batch->shards) {
      const auto it = streams_.find(plan.stream);
      if (it == streams_.end() || it->second.probe_epoch != command.epoch) continue;
      tolerance = std::max(tolerance, server::ProbeTolerance(it->second.hello.backend));
      references[static_cast<std::size_t>(plan.rank)] = it->second.probe_output;
    }
    const absl::StatusOr<std::vector<float>> output = JoinProbeOutput(*batch);
    verdict = output.ok() ? server::VerifyProbe(batch->probe, machine_->placement(), hidden_,
                                                references, *output, tolerance)
                          : output.status();
  }
  batches_->Erase(command.epoch, command.batch);
  if (verdict.ok()) {
    runtime::LogInfo("probe_right", {{"epoch", command.epoch}});
  } else {
    runtime::LogError("probe_wrong", {{"epoch", command.epoch}, {"status", verdict}});
  }
  raised_.push_back(ProbeVerified{command.epoch, verdict.ok(), std::string(verdict.message())});
}

InferTimes Host::TimesOf(const KeptBatch& batch, EpochId epoch, TimeUs arrived_us,
                         bool trace) const {
  InferTimes times;
  times.queue_us = std::max<std::int64_t>(batch.started_us - arrived_us, 0);
  times.assign_us = batch.times.assign_ns / 1000;
  times.counts_ns = batch.times.counts_ns;
  times.dispatch_us = batch.times.dispatch_ns / 1000;
  times.ffn_us = batch.times.ffn_ns / 1000;
  times.combine_us = batch.times.combine_ns / 1000;
  times.epoch = epoch;
  times.count_exchange = CountExchangeName(batch.counts);
  times.started_us = batch.started_us;
  if (!trace) return times;
  for (std::size_t i = 0; i < batch.shards.size(); ++i) {
    const WorkerTimes& of = batch.times_of_rank[i];
    if (of.start_ns == 0) continue;  // It took no part.
    times.ranks.push_back({batch.shards[i].rank, of.start_ns, of.assign_ns, of.counts_ns,
                           of.dispatch_ns, of.ffn_ns, of.combine_ns});
  }
  return times;
}

void Host::ObserveBatch(const KeptBatch& batch) {
  const auto observe = [&](PhaseMetric phase, std::int64_t ns) {
    metrics_->ObservePhase(phase, static_cast<double>(ns) * kSecondsPerNs);
  };
  metrics_->AddBatch(batch.counts);
  observe(PhaseMetric::kAssign, batch.times.assign_ns);
  observe(PhaseMetric::kCounts, batch.times.counts_ns);
  observe(PhaseMetric::kDispatch, batch.times.dispatch_ns);
  observe(PhaseMetric::kFfn, batch.times.ffn_ns);
  observe(PhaseMetric::kCombine, batch.times.combine_ns);
  metrics_->AddRegionBytes(RegionWay::kDirect, batch.direct_bytes);
  metrics_->AddRegionBytes(RegionWay::kCopied, batch.copied_bytes);
  metrics_->AddRegionBytes(RegionWay::kDevice, batch.device_bytes);
  metrics_->ObservePhase(PhaseMetric::kReply,
                         static_cast<double>(NowUs() - batch.last_done_us) * kSecondsPerUs);
}

void Host::Execute(FinishBatch& command) {
  const KeptBatch* batch = batches_->Find(command.epoch, command.batch);
  for (const RequestRows& part : command.requests) {
    const auto it = requests_.find(part.request);
    if (it == requests_.end()) continue;
    PendingRequest& pending = *it->second.pending;
    const absl::Status delivered = Deliver(batch, part.request, pending);
    if (delivered.ok()) {
      const InferTimes times =
          TimesOf(*batch, command.epoch, it->second.arrived_us, pending.request.trace);
      metrics_->ObservePhase(PhaseMetric::kQueue,
                             static_cast<double>(times.queue_us) * kSecondsPerUs);
      metrics_->AddTokens(part.rows.size());
      pending.Complete({absl::OkStatus(), times, 0});
    } else {
      pending.Complete({delivered, {}, 0});
    }
    requests_.erase(it);
  }
  if (batch != nullptr) ObserveBatch(*batch);
  batches_->Erase(command.epoch, command.batch);
  ForgetRegions();
}

absl::Status Host::Deliver(const KeptBatch* batch, RequestId request, PendingRequest& pending) {
  if (batch == nullptr) return absl::InternalError("batch: it is not known");
  for (const KeptPart& part : batch->parts) {
    if (part.request != request) continue;
    if (std::optional<LentRows> lent = LendOutput(*batch, part)) {
      metrics_->AddOutputBytes(OutputWay::kLent, static_cast<std::int64_t>(lent->rows.size()));
      pending.TakeOutput(lent->rows, std::move(lent->owner));
      return absl::OkStatus();
    }
    if (part.output.region != nullptr) return DeliverOutput(*batch, part, {});
    const std::span<char> output = pending.MutableOutput();
    EPS_RETURN_IF_ERROR(DeliverOutput(*batch, part, output));
    metrics_->AddOutputBytes(OutputWay::kCopied, static_cast<std::int64_t>(output.size()));
    return absl::OkStatus();
  }
  return absl::InternalError("batch: the request is not in it");
}

void Host::ForgetRegions() {
  const std::vector<std::uint64_t> forgotten = batches_->regions().TakeForgotten();
  if (forgotten.empty()) return;
  for (const StreamId stream : batches_->regions().reachable()) {
    Send(stream, ForgetRegionsMessage{forgotten});
  }
}

void Host::Execute(DropBatch& command) {
  batches_->Drop(command.epoch, command.batch,
                 [this](StreamId stream) { return streams_.contains(stream); });
}

void Host::Execute(CompleteRequest& command) {
  const auto it = requests_.find(command.request);
  if (it == requests_.end()) return;
  Completion completion;
  completion.status = absl::Status(command.code, command.message);
  completion.times.epoch = command.epoch;
  completion.retry_pushback_ms = std::max<std::int64_t>(command.pushback_ms, 0);
  it->second.pending->Complete(std::move(completion));
  requests_.erase(it);
}

void Host::Execute(SetServing& command) {
  ready_.store(command.serving, std::memory_order_release);
  runtime::LogInfo(command.serving ? "serving" : "not_serving", {{"epoch", command.epoch}});
  device_regions_.SetServing(command.serving);
  if (hooks_.on_serving) hooks_.on_serving(command.serving);
}

void Host::Execute(DrainWorkerDone& command) {
  const auto it = worker_drains_.find(command.token);
  if (it == worker_drains_.end()) return;
  it->second(absl::Status(command.code, command.message));
  worker_drains_.erase(it);
}

void Host::Execute(ClusterDrained&) {
  runtime::LogInfo("drained");
  if (hooks_.on_drained) hooks_.on_drained();
}

void Host::Execute(Notice& command) {
  std::vector<runtime::LogField> fields;
  for (const NoticeField& field : command.fields) {
    std::visit([&](const auto& value) { fields.emplace_back(field.key, value); }, field.value);
  }
  runtime::Log(LogLevelOf(command.level), command.event, std::span(fields));
}

}  // namespace epserve::coordinator
