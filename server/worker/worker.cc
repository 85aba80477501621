#include "server/worker/worker.h"

#include <unistd.h>

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/base/log.h"
#include "server/common/probe.h"
#include "server/common/process_identity.h"
#include "server/worker/clock.h"
#include "server/worker/load_progress.h"

namespace epserve::worker {
namespace {

using runtime::Log;
using runtime::LogError;
using runtime::LogInfo;
using runtime::LogLevel;
using runtime::LogWarning;

// Assumed until the first lease says otherwise: the coordinator's default.
constexpr std::int64_t kFirstLeaseUs = 1'000'000;
// A coordinator that answers no heartbeat of an epoch for so many leases has long given this worker
// up, or is gone; a new connection finds out. It may be paused for less and go on.
constexpr std::int64_t kSilentLeases = 4;
constexpr std::int64_t kLoadReportUs = 200'000;
// How long the coordinator may take to end its side of a stream that this side has ended.
constexpr absl::Duration kCloseTimeout = absl::Seconds(1);

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <class... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

std::string MakeIncarnation() {
  std::random_device random;
  return absl::StrFormat("%08x%08x%08x%08x", random(), random(), random(), random());
}

}  // namespace

Worker::Worker(WorkerConfig config, std::unique_ptr<runtime::Engine> engine)
    : config_(std::move(config)),
      engine_(std::move(engine)),
      incarnation_(MakeIncarnation()),
      lease_duration_us_(kFirstLeaseUs) {
  executor_ = std::make_unique<BatchExecutor>(
      BatchExecutor::Config{.num_slots = config_.num_slots,
                            .max_batch_tokens = config_.max_batch_tokens,
                            .trigger_timeout = config_.peer_timeout,
                            .busy_poll = config_.coordinator.busy_poll,
                            .now_us = config_.now_us},
      engine_.get(), &lease_, static_cast<BatchReporter*>(this));
}

Worker::~Worker() {
  if (loader_.joinable()) loader_.join();
}

absl::Status Worker::Run() {
  LogInfo("worker_started", {{"worker", config_.worker_id},
                             {"coordinator", config_.coordinator.target},
                             {"backend", engine_->backend()},
                             {"pid", static_cast<std::int64_t>(getpid())}});
  Connect();
  while (!result_) {
    std::optional<Event> event = NextEvent();
    if (event) {
      std::visit([this](auto& e) { Handle(e); }, *event);
    } else {
      OnTimer();
    }
    TellReady(session_.settled() && !result_ && !leave_by_);
  }
  Perform(session_.OnStreamLost());
  DropStream();
  if (result_->ok()) LogInfo("worker_left", {{"worker", config_.worker_id}});
  return *result_;
}

void Worker::RequestLeave(std::string reason) { Post(LeaveAsked{std::move(reason)}); }

// ---- from other threads

void Worker::OnMessage(CoordinatorMessage message) {
  const auto to_session = [&](auto& m) { Post(FromCoordinator{generation_.load(), std::move(m)}); };
  std::visit(Overloaded{
                 [&](LeaseGrant& grant) {
                   if (!lease_.Renew(grant.epoch, grant.echo_us, grant.duration_us)) return;
                   lease_duration_us_ = grant.duration_us;
                   lease_is_known_ = true;
                   last_answered_us_ = grant.echo_us;
                 },
                 [&](Shard& shard) {
                   shard.received_ns = SteadyNowNs();
                   executor_->Submit(std::move(shard));
                 },
                 [&](CountsKnown& known) { executor_->SetCounts(std::move(known)); },
                 [&](DispatchTrigger& trigger) { executor_->Trigger(trigger); },
                 [&](CombineTrigger& trigger) { executor_->Trigger(trigger); },
                 [&](ForgetRegions& gone) { executor_->Forget(gone); },
                 [&](EpochEnded& ended) {
                   // At once, so that no slot waits for a peer that is gone; the rest in order.
                   executor_->AbortEpoch(ended.epoch);
                   to_session(ended);
                 },
                 [&](auto& other) { to_session(other); },
             },
             message);
}

ControlStream::Tick Worker::OnHeartbeatDue() {
  const std::int64_t now_us = config_.now_us();
  const std::int64_t duration_us = lease_duration_us_;
  ControlStream::Tick tick;
  tick.heartbeat = {
      .epoch = lease_.epoch(), .sent_monotonic_us = now_us, .resident_bytes = ResidentBytes()};
  tick.next = absl::Microseconds(
      HeartbeatIntervalUs(lease_.expires_us().has_value(), lease_is_known_ ? duration_us : 0));
  const std::int64_t silent_us = now_us - last_answered_us_;
  if (tick.heartbeat.epoch != 0 && silent_us > kSilentLeases * duration_us) {
    tick.status = absl::UnavailableError(
        absl::StrCat("control stream: the coordinator has answered no heartbeat of epoch ",
                     tick.heartbeat.epoch, " for ", silent_us / 1000, " ms; connecting anew"));
  }
  return tick;
}

void Worker::OnClosed(const absl::Status& status) {
  executor_->AbortAnyEpoch();
  Post(StreamEnded{generation_.load(), status});
}

std::shared_ptr<ControlStream> Worker::Stream() {
  std::lock_guard<std::mutex> lock(stream_mutex_);
  return stream_;
}

void Worker::Report(WorkerMessage message) {
  const std::shared_ptr<ControlStream> stream = Stream();
  if (stream) stream->Send(std::move(message));
}

void Worker::OnLeaseExpired(std::uint64_t epoch) { Post(LeaseExpired{epoch}); }

// ---- events

void Worker::Post(Event event) {
  std::lock_guard<std::mutex> lock(events_mutex_);
  events_.push_back(std::move(event));
  events_changed_.notify_one();
}

std::optional<Worker::TimePoint> Worker::NextTimer() const {
  if (reconnect_at_ && leave_by_) return std::min(*reconnect_at_, *leave_by_);
  return reconnect_at_ ? reconnect_at_ : leave_by_;
}

std::optional<Worker::Event> Worker::NextEvent() {
  const std::optional<TimePoint> timer = NextTimer();
  std::unique_lock<std::mutex> lock(events_mutex_);
  const auto some = [this] { return !events_.empty(); };
  if (!timer) {
    events_changed_.wait(lock, some);
  } else if (!events_changed_.wait_until(lock, *timer, some)) {
    return std::nullopt;
  }
  Event event = std::move(events_.front());
  events_.pop_front();
  return event;
}

void Worker::OnTimer() {
  const TimePoint now = std::chrono::steady_clock::now();
  if (leave_by_ && now >= *leave_by_) {
    LogWarning("leave_timed_out", {{"worker", config_.worker_id}});
    executor_->RefuseWhenIdle(absl::ZeroDuration());
    result_ = absl::OkStatus();
  } else if (reconnect_at_ && now >= *reconnect_at_) {
    Connect();
  }
}

void Worker::Handle(FromCoordinator& event) {
  if (event.generation != generation_) return;
  if (!std::exchange(greeted_, true)) {
    backoff_.Succeeded();
    LogInfo("coordinator_joined", {{"coordinator", config_.coordinator.target}});
  }
  std::visit(Overloaded{
                 [&](Assignment& m) {
                   if (m.placement.num_experts() != engine_->model().num_experts) {
                     Fail(absl::InvalidArgumentError(absl::StrCat(
                         "assignment: the coordinator spreads ", m.placement.num_experts(),
                         " experts, this worker's checkpoint has ", engine_->model().num_experts)));
                     return;
                   }
                   LogInfo("assigned", {{"rank", m.rank}, {"workers", m.placement.num_ranks()}});
                   Perform(session_.OnAssignment(m));
                 },
                 [&](Standby& m) {
                   LogInfo("standby", {{"reason", m.reason}});
                   Perform(session_.OnStandby());
                 },
                 [&](CreateHeap& m) {
                   offered_ = std::move(m);
                   Perform(session_.OnCreateHeap(offered_.epoch));
                 },
                 [&](OpenPeers& m) {
                   peer_handles_ = std::move(m.handles);
                   Perform(session_.OnOpenPeers(m.epoch));
                 },
                 [&](OpenDeviceRegion& m) { Report(DeviceRegionOpened{shared_rows_.Open(m)}); },
                 [&](CloseDeviceRegions& m) {
                   shared_rows_.Close(m);
                   Report(DeviceRegionsClosed{std::move(m.regions)});
                 },
                 [&](EpochStarted& m) { Perform(session_.OnEpochStarted(m.epoch)); },
                 [&](EpochEnded& m) {
                   LogInfo("epoch_ended", {{"epoch", m.epoch}, {"reason", m.reason}});
                   Perform(session_.OnEpochEnded(m.epoch));
                 },
                 [&](Rejected& m) {
                   result_ = absl::Status(m.status.code(),
                                          absl::StrCat("the coordinator rejected this worker: ",
                                                       std::string(m.status.message())));
                 },
                 [&](Shutdown& m) {
                   LogInfo("shutdown", {{"reason", m.reason}});
                   Leave();
                 },
                 [](auto&) {},  // Batches and leases never come this way.
             },
             event.message);
}

void Worker::Handle(StreamEnded& event) {
  if (event.generation != generation_) return;
  Perform(session_.OnStreamLost());
  DropStream();
  if (leave_by_) {
    result_ = absl::OkStatus();
  } else {
    ScheduleReconnect(event.status);
  }
}

void Worker::Handle(LoadEnded& event) {
  loader_.join();
  if (!event.status.ok()) {
    Fail(event.status);
    return;
  }
  probe_output_ = std::move(event.probe_output);
  LogInfo("weights_loaded", {{"bytes", plan_.weight_bytes}, {"held_as", plan_.held_type}});
  Perform(session_.OnLoaded());
}

void Worker::Handle(LeaseExpired& event) {
  LogWarning("lease_expired", {{"epoch", event.epoch}});
  Perform(session_.OnLeaseExpired(event.epoch));
}

void Worker::Handle(LeaveAsked& event) {
  if (leave_by_) return;
  LogInfo("leaving", {{"reason", event.reason}});
  if (!greeted_) {
    result_ = absl::OkStatus();
    return;
  }
  // The coordinator lets accepted requests finish and then says Shutdown.
  leave_by_ = After(config_.leave_timeout);
  Report(Leaving{event.reason});
}

void Worker::Leave() {
  if (!executor_->RefuseWhenIdle(config_.leave_timeout)) {
    LogWarning("left_with_batches_running", {{"worker", config_.worker_id}});
  }
  if (!leave_by_) Report(Leaving{"told to shut down"});
  result_ = absl::OkStatus();
}

void Worker::Fail(const absl::Status& status) {
  LogError("worker_failed", {{"error", status}});
  Report(WorkerFailure{status});
  result_ = status;
}

// ---- actions

void Worker::Perform(const SessionState::Actions& actions) {
  for (const SessionAction action : actions) {
    if (result_ && action != SessionAction::kEndEpoch) return;
    Perform(action);
  }
}

void Worker::Perform(SessionAction action) {
  switch (action) {
    case SessionAction::kStartLoad:
      StartLoad();
      return;
    case SessionAction::kSendLoaded:
      Report(Loaded{.rank = session_.held()->rank,
                    .num_ranks = session_.held()->placement.num_ranks(),
                    .weight_bytes = plan_.weight_bytes,
                    .heap_bytes = plan_.heap_bytes});
      return;
    case SessionAction::kCreateHeap:
      DoCreateHeap();
      return;
    case SessionAction::kOpenPeers:
      DoOpenPeers();
      return;
    case SessionAction::kStartEpoch:
      engine_->SealHeap();
      executor_->StartEpoch(session_.epoch());
      LogInfo("epoch_started", {{"epoch", session_.epoch()}, {"rank", session_.held()->rank}});
      return;
    case SessionAction::kEndEpoch:
      DoEndEpoch();
      return;
    case SessionAction::kSendQuiesced:
      Report(EpochQuiesced{session_.quiesced_epoch()});
      return;
    case SessionAction::kDropStream:
      Perform(session_.OnStreamLost());
      DropStream();
      ScheduleReconnect(absl::AbortedError("the epoch could not be formed here"));
      return;
  }
}

void Worker::StartLoad() {
  const Assignment assignment = *session_.wanted();
  absl::StatusOr<runtime::MemoryPlan> plan =
      engine_->PlanMemory(assignment.placement, assignment.rank);
  if (!plan.ok()) {
    Fail(plan.status());
    return;
  }
  plan_ = *std::move(plan);
  const absl::StatusOr<AvailableMemory> available = config_.available_memory();
  if (!available.ok()) return Fail(available.status());
  LogMemoryPlan(plan_, *available);
  if (config_.progress_on_terminal) runtime::LogText(MemoryTable(plan_, *available));
  const absl::Status fits = CheckMemoryFits(plan_, *available);
  if (!fits.ok()) return Fail(fits);
  loader_ = std::thread([this, assignment] { Load(assignment); });
}

// On the loading thread.
void Worker::Load(const Assignment& assignment) {
  LoadEnded ended;
  {
    LoadProgressDisplay display(
        runtime::LogText, config_.progress_on_terminal, SteadyNowUs,
        [](int percent, std::uint64_t loaded, std::uint64_t total) {
          LogInfo("loading", {{"percent", percent}, {"bytes", loaded}, {"of", total}});
        });
    std::int64_t reported_us = SteadyNowUs();
    ended.status = engine_->LoadExperts(
        assignment.placement, assignment.rank, [&](std::uint64_t loaded, std::uint64_t total) {
          display.Update(loaded, total);
          const std::int64_t now_us = SteadyNowUs();
          if (now_us - reported_us < kLoadReportUs && loaded < total) return;
          reported_us = now_us;
          Report(LoadProgress{.loaded_bytes = loaded, .total_bytes = total});
        });
  }
  const std::int64_t expert = server::ProbeExpert(assignment.placement, assignment.rank);
  if (ended.status.ok() && expert >= 0) {
    absl::StatusOr<std::vector<float>> output = engine_->ReferenceExpert(
        engine_->model().layers.front(), expert, server::ProbeRow(engine_->model().hidden));
    ended.status = output.status();
    if (output.ok()) ended.probe_output = *std::move(output);
  }
  Post(std::move(ended));
}

void Worker::DoCreateHeap() {
  const std::uint64_t epoch = session_.epoch();
  last_answered_us_ = config_.now_us();
  lease_.Enter(epoch);
  // The lease must be there by the first batch.
  if (const std::shared_ptr<ControlStream> stream = Stream()) stream->HurryHeartbeat();
  absl::StatusOr<std::string> handle = engine_->CreateHeap(epoch);
  // A GPU that is lost does not come back in this process: whoever started it starts another.
  if (absl::IsInternal(handle.status())) return Fail(handle.status());
  if (!handle.ok()) return EpochFailed(handle.status());
  shared_rows_ = ShareRows(offered_,
                           {.cluster_id = config_.cluster_id,
                            .epoch = epoch,
                            .num_slots = config_.num_slots,
                            .max_batch_tokens = config_.max_batch_tokens,
                            .hidden = engine_->model().hidden,
                            .topk = engine_->model().topk},
                           *engine_);
  Report(HeapCreated{
      .epoch = epoch,
      .handle = *std::move(handle),
      .row_arena_mapped = shared_rows_.arena != nullptr,
      .regions_reachable = shared_rows_.regions != nullptr,
      .takes_shared_batches = shared_rows_.arena != nullptr && engine_->takes_shared_batches(),
      .refused_regions = shared_rows_.refused,
      .handle_type = engine_->handle_type()});
}

void Worker::DoOpenPeers() {
  const std::uint64_t epoch = session_.epoch();
  const absl::Status opened = engine_->OpenPeers(peer_handles_);
  if (!opened.ok()) return EpochFailed(opened);
  // Before the answer goes out: shards may follow on its heels.
  executor_->OpenEpoch(epoch, session_.held()->placement, session_.held()->rank, shared_rows_.arena,
                       shared_rows_.regions, shared_rows_.device_regions);
  Report(PeersOpened{.epoch = epoch, .probe_output = probe_output_});
}

void Worker::DoEndEpoch() {
  executor_->AbortAnyEpoch();
  executor_->Drain();
  lease_.Leave();
  engine_->CloseEpoch();
  shared_rows_ = {};  // Only now: the engine may have used the arena in place.
}

void Worker::EpochFailed(const absl::Status& status) {
  LogError("epoch_failed", {{"epoch", session_.epoch()}, {"error", status}});
  Report(WorkerFailure{status});
  Perform(session_.OnEpochFailed(session_.epoch()));
}

// ---- stream

Hello Worker::MakeHello() const {
  Hello hello;
  hello.worker_id = config_.worker_id;
  hello.incarnation = incarnation_;
  hello.version = config_.version;
  hello.backend = std::string(engine_->backend());
  hello.model = engine_->model();
  hello.last_epoch = session_.last_epoch();
  if (session_.held()) {
    hello.held_rank = session_.held()->rank;
    hello.held_num_ranks = session_.held()->placement.num_ranks();
  }
  hello.node = config_.node;
  hello.process = server::OwnProcessIdentity();
  hello.max_batch_tokens = config_.max_batch_tokens;
  hello.cluster_id = config_.cluster_id;
  hello.num_slots = config_.num_slots;
  hello.device_counts = engine_->exchanges_counts();
  return hello;
}

void Worker::Connect() {
  reconnect_at_.reset();
  greeted_ = false;
  session_.OnStreamOpened();
  ++generation_;
  ControlStream::Handler* const handler = this;
  auto stream = std::make_shared<ControlStream>(config_.coordinator, MakeHello(), handler);
  std::lock_guard<std::mutex> lock(stream_mutex_);
  stream_ = std::move(stream);
}

void Worker::DropStream() {
  std::shared_ptr<ControlStream> stream;
  {
    std::lock_guard<std::mutex> lock(stream_mutex_);
    stream = std::exchange(stream_, nullptr);
  }
  if (stream) stream->CloseAfterFlush(kCloseTimeout);
  ++generation_;  // What it still left in the queue is void.
  greeted_ = false;
}

void Worker::ScheduleReconnect(const absl::Status& why) {
  const ReconnectBackoff::Attempt attempt = backoff_.Failed(std::chrono::steady_clock::now());
  if (attempt.log) {
    // At first it may only have been stopped or started anew, as at every stop of the service.
    const bool for_long = attempt.away > absl::ZeroDuration();
    Log(for_long ? LogLevel::kWarning : LogLevel::kInfo, "coordinator_lost",
        {{"coordinator", config_.coordinator.target},
         {"for_ms", absl::ToInt64Milliseconds(attempt.away)},
         {"error", why}});
  }
  reconnect_at_ = After(attempt.delay);
}

}  // namespace epserve::worker
