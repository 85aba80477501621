#include "server/coordinator/host.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {
namespace {

// A request of so many bytes of rows to copy or more, and what its batch gives rise to, is the
// timer's thread's work: that takes up to 0.1 s, in which whoever posts must go on reading
// heartbeats.
constexpr std::uint64_t kLargeBytes = std::uint64_t{1} << 20;

constexpr const char* kStopped = "coordinator: shutting down; retry against another coordinator";

RowType RowTypeOf(runtime::DataType type) {
  switch (type) {
    case runtime::DataType::kFp16:
      return RowType::kFp16;
    case runtime::DataType::kBf16:
      return RowType::kBf16;
    default:
      return RowType::kFp32;
  }
}

// Rows in clients' CUDA memory are not copied here, however many they are.
bool IsLarge(const ValidatedRequest& request) {
  if (InCuda(request.source.region.get()) && InCuda(request.output.region.get())) return false;
  return request.output_bytes >= kLargeBytes;
}

TimeUs ToUs(Host::Clock::time_point time) {
  if (time == Host::Clock::time_point::max()) return kNever;
  return std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count();
}

}  // namespace

Host::Host(const Config& config, std::int64_t hidden, RowTransport row_transport, Metrics* metrics,
           HostHooks hooks)
    : config_(config),
      hidden_(hidden),
      row_transport_(std::move(row_transport)),
      metrics_(metrics),
      hooks_(std::move(hooks)) {
  expert_rows_.assign(config.layers.size(),
                      std::vector<std::uint64_t>(static_cast<std::size_t>(config.num_experts), 0));
}

Host::~Host() { Stop(); }

void Host::Start() {
  config_.start_us = NowUs();
  machine_ = std::make_unique<StateMachine>(config_);
  batches_ = std::make_unique<BatchStore>(machine_->placement(), hidden_, config_.topk);
  UpdateGauges();
  auto watch = ProcessWatch::Start([this](ProcessEnded ended) {
    Report({std::move(ended)});
    TellInputTakenIfWanted();
  });
  if (watch.ok()) {
    process_watch_ = *std::move(watch);
  } else {
    runtime::LogWarning("processes_not_watched", {{"error", watch.status()}});
  }
  timer_ = std::thread([this] { KeepTime(); });
  RunTurn();
}

void Host::Stop() {
  {
    std::unique_lock<std::mutex> lock(mu_);
    if (std::exchange(stopping_, true)) return;
    if (timer_.joinable()) changed_.wait(lock, [this] { return !turn_taken_; });
    turn_taken_ = true;  // The last turn, never given up.
    changed_.notify_all();
  }
  if (timer_.joinable()) timer_.join();
  if (process_watch_ != nullptr) process_watch_->Stop();
  for (Item& item : inbox_) Refuse(item);  // What came before a Start() that never was.
  inbox_.clear();
  Shut();
}

TimeUs Host::NowUs() { return ToUs(Clock::now()); }

// ---- from other threads

void Host::Post(Item item) {
  bool refused = false;
  {
    std::lock_guard<std::mutex> lock(mu_);
    refused = stopping_;
    if (!refused) {
      const auto* request = std::get_if<std::unique_ptr<PendingRequest>>(&item);
      const bool large =
          large_requests_.load() > 0 || (request != nullptr && IsLarge((*request)->request));
      inbox_.push_back(std::move(item));
      if (turn_taken_ || turn_wanted_) return;
      if (large) {
        turn_wanted_ = true;
        changed_.notify_all();
        return;
      }
      turn_taken_ = true;
    }
  }
  if (refused) {
    Refuse(item);  // NOLINT(bugprone-use-after-move): it was not moved
  } else {
    RunTurn();
  }
}

void Host::Refuse(Item& item) {
  if (auto* request = std::get_if<std::unique_ptr<PendingRequest>>(&item)) {
    (*request)->Complete({absl::UnavailableError(kStopped), {}, 0});
  } else if (auto* query = std::get_if<Query>(&item)) {
    (*query)(/*stopped=*/true);
  } else if (auto* opened = std::get_if<NewStream>(&item)) {
    opened->stream->Close(absl::UnavailableError(kStopped), /*flush=*/false);
  }
}

void Host::Submit(std::unique_ptr<PendingRequest> request) { Post(std::move(request)); }

void Host::Cancel(std::uint64_t id) { Post(CancelRequest{id}); }

void Host::OnAnswered(absl::StatusCode code, std::chrono::nanoseconds server_time) {
  metrics_->AddRequest(code, std::chrono::duration<double>(server_time).count());
}

void Host::OpenStream(StreamId id, std::shared_ptr<WorkerStream> stream, HelloInfo hello) {
  Post(NewStream{id, std::move(stream), std::move(hello)});
}

void Host::Report(WorkerReport report) { Post(std::move(report)); }

void Host::QueryCluster(std::function<void(absl::StatusOr<ClusterView>)> done) {
  Post(Query([this, done = std::move(done)](bool stopped) {
    if (stopped) return done(absl::UnavailableError(kStopped));
    done(View());
  }));
}

void Host::QueryExpertLoad(std::int64_t layer,
                           std::function<void(absl::StatusOr<std::vector<std::uint64_t>>)> done) {
  Post(Query([this, layer, done = std::move(done)](bool stopped) {
    if (stopped) return done(absl::UnavailableError(kStopped));
    std::vector<std::uint64_t> rows(static_cast<std::size_t>(config_.num_experts), 0);
    bool found = layer == -1;
    for (std::size_t i = 0; i < config_.layers.size(); ++i) {
      if (layer != -1 && config_.layers[i] != layer) continue;
      found = true;
      for (std::size_t e = 0; e < rows.size(); ++e) rows[e] += expert_rows_[i][e];
    }
    if (!found) {
      return done(absl::NotFoundError(
          absl::StrCat("expert load: layer ", layer, " has no experts; give one of the model's ",
                       config_.layers.size(), " expert layers, or -1 for their sum")));
    }
    done(std::move(rows));
  }));
}

void Host::DrainWorker(std::string worker_id, std::function<void(absl::Status)> done) {
  Post(Query([this, worker_id = std::move(worker_id), done = std::move(done)](bool stopped) {
    if (stopped) return done(absl::UnavailableError(kStopped));
    const std::uint64_t token = next_drain_token_++;
    worker_drains_[token] = done;
    ApplyEvent(coordinator::DrainWorker{worker_id, token});
  }));
}

void Host::DrainCluster() {
  Post(Drain{});
  TellInputTakenIfWanted();
}

// After a turn of a thread that takes in nothing: whoever does may be asleep by now, and knows
// nothing of this turn.
void Host::TellInputTakenIfWanted() {
  if (wants_input_taken()) TellInputTaken();
}

// ---- in the turn

void Host::RunTurn() {
  for (;;) {
    // After the waiting events: a heartbeat that came in time counts even if this turn is late.
    std::optional<TimeUs> deadline = machine_->NextDeadline();
    {
      std::lock_guard<std::mutex> lock(mu_);
      if (inbox_.empty() && (!deadline.has_value() || NowUs() < *deadline)) {
        deadline_us_ = deadline.value_or(kNever);
        wants_input_taken_.store(machine_->WantsInputTaken(), std::memory_order_relaxed);
        GiveUpTurn();
        return;
      }
      taken_.swap(inbox_);
    }
    for (Item& item : taken_) {
      std::visit([this](auto& content) { Handle(content); }, item);
    }
    taken_.clear();
    deadline = machine_->NextDeadline();
    if (deadline.has_value() && NowUs() >= *deadline) ApplyEvent(Tick{});
    UpdateGauges();
  }
}

void Host::GiveUpTurn() {
  turn_taken_ = false;
  if (stopping_ || deadline_us_ < timer_wakes_us_) changed_.notify_all();
}

void Host::KeepTime() {
  std::unique_lock<std::mutex> lock(mu_);
  while (!stopping_) {
    timer_wakes_us_ = turn_taken_ ? kNever : deadline_us_;
    const bool due = !turn_taken_ && (turn_wanted_ || NowUs() >= timer_wakes_us_);
    if (!due && timer_wakes_us_ == kNever) {
      changed_.wait(lock);
    } else if (!due) {
      changed_.wait_until(lock, Clock::time_point(std::chrono::microseconds(timer_wakes_us_)));
    } else {
      turn_taken_ = true;
      turn_wanted_ = false;
      lock.unlock();
      RunTurn();
      TellInputTakenIfWanted();
      lock.lock();
    }
  }
}

void Host::Shut() {
  for (auto& [id, record] : requests_) {
    record.pending->Complete({absl::UnavailableError(kStopped), {}, 0});
  }
  requests_.clear();
  // Whoever waits for regions to be released is told while there is a server to tell them.
  batches_ = nullptr;
  device_regions_.Stop(absl::UnavailableError(kStopped));
  for (auto& [token, done] : worker_drains_) done(absl::UnavailableError(kStopped));
  worker_drains_.clear();
  for (auto& [id, record] : streams_) {
    record.stream->Close(absl::UnavailableError(kStopped), /*flush=*/false);
  }
  streams_.clear();
  ready_.store(false, std::memory_order_release);
}

void Host::ApplyEvent(Event event) {
  raised_.push_back(std::move(event));
  if (applying_) return;
  applying_ = true;
  while (!raised_.empty()) {
    std::vector<Command> commands = machine_->Apply(raised_.front(), NowUs());
    raised_.pop_front();
    for (Command& command : commands) {
      std::visit([this](auto& content) { Execute(content); }, command);
    }
  }
  applying_ = false;
}

void Host::Handle(std::unique_ptr<PendingRequest>& request) {
  const RequestId id = request->id;
  const ValidatedRequest& validated = request->request;
  if (absl::Status usable = device_regions_.CheckUsable(validated); !usable.ok()) {
    return request->Complete({std::move(usable), {}, 0});
  }
  RequestArrived event;
  event.request = id;
  event.caller = request->caller;
  event.layer = validated.layer;
  event.row_type = RowTypeOf(validated.dtype);
  event.routed = validated.routed;
  event.ids_hidden = validated.ids_source.region != nullptr;
  event.num_tokens = validated.num_tokens;
  if (event.num_tokens <= config_.single_source_tokens && event.routed && !event.ids_hidden) {
    event.rank_of_most_experts =
        runtime::RankOfMostExperts(validated.topk_ids, machine_->placement());
  }
  event.deadline_us = ToUs(request->deadline);
  const TimeUs arrived_us = ToUs(request->arrival);
  RequestRecord record{std::move(request), arrived_us, nullptr};
  if (IsLarge(validated)) {
    large_requests_.fetch_add(1);
    record.large.reset(&large_requests_);
  }
  requests_.emplace(id, std::move(record));
  ApplyEvent(event);
}

void Host::Handle(CancelRequest& cancel) { ApplyEvent(RequestCancelled{cancel.id}); }

void Host::Handle(NewStream& opened) {
  WorkerHello event;
  event.stream = opened.id;
  event.worker_id = opened.hello.worker_id;
  event.incarnation = opened.hello.incarnation;
  event.last_epoch = opened.hello.last_epoch;
  event.held_rank = opened.hello.held_rank;
  event.held_num_ranks = opened.hello.held_num_ranks;
  event.backend = opened.hello.backend;
  event.device_counts = opened.hello.device_counts;
  if (hello_limit_.Allows(opened.hello.incarnation)) {  // One that may not join comes for ever.
    runtime::LogInfo("worker_hello", {{"worker", opened.hello.worker_id},
                                      {"node", opened.hello.node},
                                      {"pid", opened.hello.process.pid},
                                      {"backend", opened.hello.backend},
                                      {"last_epoch", opened.hello.last_epoch},
                                      {"held_rank", opened.hello.held_rank}});
  }
  StreamRecord& record = streams_[opened.id];
  record.stream = std::move(opened.stream);
  record.hello = std::move(opened.hello);
  WatchProcess(record.hello);
  ApplyEvent(event);  // May close the stream, which ends the record.
}

void Host::WatchProcess(const HelloInfo& hello) {
  if (process_watch_ == nullptr) return;
  const absl::Status watched =
      process_watch_->Watch({hello.worker_id, hello.incarnation}, hello.process);
  if (watched.ok()) return;
  runtime::LogDebug("process_not_watched", {{"worker", hello.worker_id}, {"reason", watched}});
}

void Host::Handle(Query& query) { query(/*stopped=*/false); }

void Host::Handle(Drain&) { ApplyEvent(coordinator::DrainCluster{}); }

void Host::Handle(WorkerReport& report) {
  if (report.answer.has_value()) return device_regions_.OnAnswer(*report.answer);
  if (auto* done = std::get_if<BatchDone>(&report.event)) return HandleBatchDone(report, *done);
  if (auto* created = std::get_if<HeapCreated>(&report.event)) {
    if (report.row_arena_mapped) batches_->UseArena(created->epoch, created->stream);
    if (report.regions_reachable) batches_->UseRegions(created->epoch, created->stream);
    if (report.takes_shared_batches) batches_->UseSharedRows(created->epoch, created->stream);
    device_regions_.OnRefused(created->epoch, created->stream, report.refused);
    const auto it = streams_.find(created->stream);
    // One that crossed its epoch's end is closed by now.
    if (it != streams_.end() && it->second.heap_epoch == created->epoch) {
      it->second.handle_type = std::move(report.handle_type);
      CountHeaps();
    }
  }
  if (auto* opened = std::get_if<PeersOpened>(&report.event)) {
    const auto it = streams_.find(opened->stream);
    if (it != streams_.end()) {
      it->second.probe_epoch = opened->epoch;
      it->second.probe_output = std::move(report.probe_output);
    }
  }
  if (std::holds_alternative<Heartbeat>(report.event)) ForgetRegions();
  ApplyEvent(report.event);
  // After the event, which may drop batches that the worker was at.
  if (auto* quiesced = std::get_if<EpochQuiesced>(&report.event)) {
    LeaveRegions(quiesced->stream);
    EndHeap(quiesced->stream, quiesced->epoch);
  }
  if (auto* closed = std::get_if<StreamClosed>(&report.event)) {
    LeaveRegions(closed->stream);
    EraseStream(closed->stream);
  }
}

void Host::HandleBatchDone(WorkerReport& report, BatchDone& done) {
  if (done.code != absl::StatusCode::kOk) {
    batches_->TakeFailure(done);
    return ApplyEvent(done);
  }
  int rank = -1;
  const absl::Status taken = batches_->TakeOutput(done, std::move(report.output), report.times,
                                                  NowUs(), &rank, report.region_faults);
  if (!taken.ok()) {
    done.code = taken.code();
    done.message = std::string(taken.message());
    ApplyEvent(done);
    // A worker that miscounts its own rows is not to be trusted with this epoch.
    ApplyEvent(WorkerFailure{done.stream, taken.code(), done.message});
    return;
  }
  const KeptBatch* batch = rank >= 0 ? batches_->Find(done.epoch, done.batch) : nullptr;
  const bool counts = batch != nullptr && !batch->is_probe;
  const std::int64_t layer = counts ? batch->layer : 0;
  ApplyEvent(done);  // First: callers wait for it, and nobody for the counters.
  if (counts) AddExpertRows(layer, rank, done.stream, report.local_expert_rows);
}

void Host::AddExpertRows(std::int64_t model_layer, int rank, StreamId stream,
                         const std::vector<std::int64_t>& local_rows) {
  const runtime::Placement& placement = machine_->placement();
  if (static_cast<std::int64_t>(local_rows.size()) != placement.num_local_experts(rank)) return;
  const auto layer = std::find(config_.layers.begin(), config_.layers.end(), model_layer);
  if (layer == config_.layers.end()) return;
  auto& load = expert_rows_[static_cast<std::size_t>(layer - config_.layers.begin())];
  const auto record = streams_.find(stream);
  for (std::size_t i = 0; i < local_rows.size(); ++i) {
    if (local_rows[i] <= 0) continue;
    const std::int64_t expert = placement.first_expert[rank] + static_cast<std::int64_t>(i);
    load[static_cast<std::size_t>(expert)] += static_cast<std::uint64_t>(local_rows[i]);
    metrics_->AddExpertRows(expert, local_rows[i]);
    if (record != streams_.end()) {
      record->second.expert_rows += static_cast<std::uint64_t>(local_rows[i]);
    }
  }
}

void Host::EraseStream(StreamId stream) {
  streams_.erase(stream);
  CountHeaps();
}

void Host::CountHeaps() {
  std::vector<std::string> handle_types;
  for (const auto& [stream, record] : streams_) {
    if (record.handle_type.has_value()) handle_types.push_back(*record.handle_type);
  }
  metrics_->SetHeaps(handle_types);
}

void Host::UpdateGauges() {
  const Load load = machine_->TakeLoad();
  metrics_->SetQueueDepth(load.queued_requests);
  metrics_->SetBatchesInFlight(load.batches_in_flight);
  const bool same = shown_load_.has_value() && load.epoch == shown_load_->epoch &&
                    load.workers == shown_load_->workers &&
                    load.workers_draining == shown_load_->workers_draining;
  shown_load_ = load;
  if (same) return;  // As after nearly every event.
  metrics_->SetEpoch(load.epoch);
  std::vector<std::pair<std::string, int>> workers;
  for (int state = 0; state < kNumWorkerStates; ++state) {
    workers.emplace_back(WorkerStateName(static_cast<WorkerState>(state), /*draining=*/false),
                         load.workers[static_cast<std::size_t>(state)]);
  }
  workers.emplace_back(WorkerStateName(WorkerState::kServing, /*draining=*/true),
                       load.workers_draining);
  metrics_->SetWorkers(workers);
}

ClusterView Host::View() const {
  ClusterView view;
  view.cluster = machine_->TakeSnapshot();
  view.requests = metrics_->request_totals();
  view.placement = machine_->placement();
  const TimeUs now_us = NowUs();
  view.uptime_ms = (now_us - config_.start_us) / 1000;
  for (const WorkerSnapshot& worker : view.cluster.workers) {
    WorkerView& shown = view.workers.emplace_back();
    shown.worker = worker;
    shown.ms_since_heartbeat = (now_us - worker.last_heartbeat_us) / 1000;
    const auto it = streams_.find(worker.stream);
    if (it == streams_.end()) continue;
    shown.node = it->second.hello.node;
    shown.pid = it->second.hello.process.pid;
    shown.backend = it->second.hello.backend;
    shown.expert_rows = it->second.expert_rows;
  }
  return view;
}

const char* WorkerStateName(WorkerState state, bool draining) {
  if (draining) return "draining";
  switch (state) {
    case WorkerState::kStandby:
      return "standby";
    case WorkerState::kLoading:
      return "loading";
    case WorkerState::kLoaded:
    case WorkerState::kQuiescing:
      return "loaded";
    case WorkerState::kForming:
      return "forming";
    case WorkerState::kServing:
      return "serving";
    case WorkerState::kLeaving:
      return "draining";
  }
  return "loaded";
}

}  // namespace epserve::coordinator
