#include "server/worker/batch_executor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "server/worker/clock.h"
#include "server/worker/shard_check.h"
#include "server/worker/shard_input.h"

namespace epserve::worker {
BatchExecutor::BatchExecutor(const Config& config, runtime::Engine* engine, const Lease* lease,
                             BatchReporter* reporter)
    : config_(config), engine_(engine), lease_(lease), reporter_(reporter) {
  for (int i = 0; i < config_.num_slots; ++i) slots_.push_back(std::make_unique<Slot>());
  for (int i = 0; i < config_.num_slots; ++i) {
    slots_[i]->thread = std::thread([this, i] { RunSlot(i); });
  }
}

BatchExecutor::~BatchExecutor() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    stopping_ = true;
    AbortLocked();
    for (auto& slot : slots_) slot->changed.notify_all();
    // Also for what runs in a caller's thread.
    idle_changed_.wait(lock, [this] { return IdleBut(nullptr); });
  }
  for (auto& slot : slots_) slot->thread.join();
}

void BatchExecutor::OpenEpoch(std::uint64_t epoch, const runtime::Placement& placement, int rank,
                              std::shared_ptr<runtime::RowArena> row_arena,
                              std::shared_ptr<RegionFiles> regions,
                              std::shared_ptr<const OpenDeviceRegions> device_regions) {
  std::lock_guard<std::mutex> lock(mutex_);
  row_arena_ = std::move(row_arena);
  regions_ = std::move(regions);
  device_regions_ = std::move(device_regions);
  epoch_ = epoch;
  placement_ = placement;
  rank_ = rank;
  state_ = EpochState::kOpen;
}

void BatchExecutor::StartEpoch(std::uint64_t epoch) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (state_ != EpochState::kOpen || epoch != epoch_) return;
  state_ = EpochState::kRunning;
  for (auto& slot : slots_) slot->changed.notify_all();
}

bool BatchExecutor::AbortLocked() {
  if (state_ != EpochState::kOpen && state_ != EpochState::kRunning) return false;
  state_ = EpochState::kAborted;
  engine_->Abort();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = *slots_[i];
    slot.queued.reset();
    slot.has_work.Lower();
    if (slot.running && slot.running->holder != Holder::kThread) {
      engine_->Discard(static_cast<int>(i));  // No thread is in it.
      EndBatch(slot);
    }
    slot.changed.notify_all();
  }
  idle_changed_.notify_all();
  return true;
}

bool BatchExecutor::AbortEpoch(std::uint64_t epoch) {
  std::lock_guard<std::mutex> lock(mutex_);
  return epoch == epoch_ && AbortLocked();
}

void BatchExecutor::AbortAnyEpoch() {
  std::lock_guard<std::mutex> lock(mutex_);
  AbortLocked();
}

void BatchExecutor::Drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  idle_changed_.wait(lock, [this] { return IdleBut(nullptr); });
  state_ = EpochState::kClosed;
  epoch_ = 0;
  row_arena_ = nullptr;
  regions_ = nullptr;
  device_regions_ = nullptr;
}

bool BatchExecutor::IdleBut(const Slot* apart) const {
  return std::all_of(slots_.begin(), slots_.end(), [apart](const auto& slot) {
    return !slot->queued && (!slot->running || slot.get() == apart);
  });
}

bool BatchExecutor::RefuseWhenIdle(absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool idle = idle_changed_.wait_for(lock, absl::ToChronoMilliseconds(timeout),
                                           [this] { return IdleBut(nullptr); });
  refusing_ = true;
  return idle;
}

std::uint64_t BatchExecutor::batches_done() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return batches_done_;
}

void BatchExecutor::Submit(Shard shard) {
  absl::Status refusal;
  Slot* taken = nullptr;
  bool runs_here = false;
  const int index = shard.slot;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool open = state_ == EpochState::kOpen || state_ == EpochState::kRunning;
    if (!open || shard.epoch != epoch_) {
      runtime::LogDebug("shard_dropped", {{"epoch", shard.epoch}, {"current", epoch_}});
      return;
    }
    refusal = CheckSlot(shard);
    if (refusal.ok()) {
      runs_here = MayRunHere(shard);
      taken = slots_[index].get();
      // The slot may still be handing in its last batch; this one is then next.
      std::unique_ptr<Batch>& place = runs_here ? taken->running : taken->queued;
      place = std::make_unique<Batch>();
      place->counts_known = shard.counts.has_value() || shard.device_counts;
      place->may_park = runs_here;
      place->shard = std::move(shard);
      if (!runs_here) taken->has_work.Raise();
    }
  }
  if (runs_here) return RunTaken(index);
  if (taken != nullptr) {
    // After the lock, or the thread woken would at once wait for it.
    taken->changed.notify_one();
    return;
  }
  BatchDone done{.epoch = shard.epoch, .batch = shard.batch, .status = std::move(refusal)};
  done.times.start_monotonic_ns = shard.received_ns;
  reporter_->Report(std::move(done));
}

// A small batch that waits for nothing but its peers, or parks where it waits for the counts, while
// nothing else is held: the others' shards would wait behind it. It never waits for `changed`,
// which is thereby the slot's thread's alone.
bool BatchExecutor::MayRunHere(const Shard& shard) const {
  return state_ == EpochState::kRunning && engine_->runs_on_any_thread() &&
         IsSmall(shard, placement_.num_ranks()) && !shard.separate_triggers &&
         shard.sources.empty() && shard.targets.empty() && shard.device_rows.empty() &&
         IdleBut(nullptr);
}

// Runs the slot's batch in the caller's thread. The next one may have come meanwhile.
void BatchExecutor::RunTaken(int index) {
  Slot& slot = *slots_[index];
  if (!Execute(index, *slot.running)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  EndBatch(slot);
  const bool has_next = slot.queued != nullptr;
  lock.unlock();
  if (has_next) slot.changed.notify_one();
}

void BatchExecutor::EndBatch(Slot& slot) {
  slot.running.reset();
  ++batches_done_;
  idle_changed_.notify_all();
}

absl::Status BatchExecutor::CheckSlot(const Shard& shard) const {
  if (refusing_) return absl::UnavailableError("batch: the worker is leaving; retry");
  if (shard.slot < 0 || shard.slot >= config_.num_slots) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: slot ", shard.slot, " is not in [0, ", config_.num_slots,
                     "); give coordinator and workers the same --slots"));
  }
  if (slots_[shard.slot]->queued) {
    return absl::InternalError(absl::StrCat("shard: slot ", shard.slot, " still holds batch ",
                                            slots_[shard.slot]->queued->shard.batch,
                                            ", cannot take ", shard.batch));
  }
  return absl::OkStatus();
}

BatchExecutor::Batch* BatchExecutor::Find(std::uint64_t epoch, std::uint64_t batch, Slot** slot) {
  if (epoch != epoch_ || (state_ != EpochState::kOpen && state_ != EpochState::kRunning)) {
    return nullptr;
  }
  for (auto& candidate : slots_) {
    *slot = candidate.get();
    for (Batch* held : {candidate->queued.get(), candidate->running.get()}) {
      if (held != nullptr && held->shard.batch == batch) return held;
    }
  }
  return nullptr;
}

void BatchExecutor::SetCounts(CountsKnown known) {
  std::unique_lock<std::mutex> lock(mutex_);
  Slot* slot = nullptr;
  Batch* batch = Find(known.epoch, known.batch, &slot);
  // Once given, the counts are in use without the lock.
  if (batch == nullptr || batch->counts_known) return;
  batch->shard.counts = std::move(known.counts);
  batch->counts_known = true;
  const bool parked = batch->holder == Holder::kNobody;
  const bool runs_here = parked && IdleBut(slot);
  if (parked) batch->holder = runs_here ? Holder::kThread : Holder::kSlotsNext;
  if (parked && !runs_here) slot->has_work.Raise();
  lock.unlock();
  if (runs_here) return RunTaken(batch->shard.slot);
  slot->changed.notify_one();
}

void BatchExecutor::Trigger(const DispatchTrigger& trigger) {
  std::unique_lock<std::mutex> lock(mutex_);
  Slot* slot = nullptr;
  Batch* batch = Find(trigger.epoch, trigger.batch, &slot);
  if (batch == nullptr) return;
  batch->dispatch_triggered = true;
  lock.unlock();
  slot->changed.notify_one();
}

void BatchExecutor::Trigger(const CombineTrigger& trigger) {
  std::unique_lock<std::mutex> lock(mutex_);
  Slot* slot = nullptr;
  Batch* batch = Find(trigger.epoch, trigger.batch, &slot);
  if (batch == nullptr) return;
  batch->combine_triggered = true;
  lock.unlock();
  slot->changed.notify_one();
}

void BatchExecutor::Forget(const ForgetRegions& gone) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (regions_ != nullptr) regions_->Forget(gone.regions);
}

void BatchExecutor::RunSlot(int index) {
  Slot& slot = *slots_[index];
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    lock.unlock();
    slot.has_work.LookFor(config_.busy_poll);
    lock.lock();
    slot.changed.wait(lock, [&] {
      return stopping_ || (slot.running ? slot.running->holder == Holder::kSlotsNext
                                        : slot.queued && state_ == EpochState::kRunning);
    });
    if (stopping_) return;
    if (!slot.running) slot.running = std::move(slot.queued);
    if (!slot.queued) slot.has_work.Lower();
    slot.running->holder = Holder::kThread;
    lock.unlock();
    Execute(index, *slot.running);
    lock.lock();
    EndBatch(slot);
  }
}

// Once the batch is parked, another thread may have ended it.
bool BatchExecutor::Execute(int index, Batch& batch) {
  const Shard& shard = batch.shard;
  BatchDone& done = batch.done;
  if (!batch.is_staged) {
    done.epoch = shard.epoch;
    done.batch = shard.batch;
    done.times.start_monotonic_ns = shard.received_ns;
    done.status = StageBatch(index, batch);
    if (done.status.ok() && Parks(batch)) return false;
  }
  if (done.status.ok()) done.status = RunStaged(index, batch);
  bool lease_expired = false;
  if (!done.status.ok()) {
    engine_->Discard(index);
    done.output.clear();
    // Whatever failed: without a lease this worker is of no use to the epoch any more.
    lease_expired = !CheckLease("batch").ok();
  }
  slots_[index]->on_device.Release();
  const std::uint64_t epoch = shard.epoch;
  if (ReportUnlessAborted(epoch, std::move(done)) && lease_expired && AbortEpoch(epoch)) {
    reporter_->OnLeaseExpired(epoch);
  }
  return true;
}

bool BatchExecutor::Parks(Batch& batch) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!batch.may_park || batch.counts_known || state_ != EpochState::kRunning) return false;
  batch.holder = Holder::kNobody;
  return true;
}

absl::Status BatchExecutor::Check(const Shard& shard) const {
  return CheckShard(shard, {.max_batch_tokens = config_.max_batch_tokens,
                            .max_shard_tokens = runtime::MaxShardTokens(config_.max_batch_tokens,
                                                                        placement_.num_ranks()),
                            .model = &engine_->model(),
                            .rank = rank_,
                            .arena = row_arena_.get(),
                            .has_regions = regions_ != nullptr,
                            .takes_shared_batches = engine_->takes_shared_batches()});
}

std::byte* BatchExecutor::RowsInArena(const Shard& shard) const {
  return ArenaRows(shard, engine_->model(), *row_arena_);
}

runtime::ShardInput BatchExecutor::InputOf(int index, const Shard& shard) const {
  return MakeShardInput(shard, engine_->model(), row_arena_.get(), slots_[index]->on_device);
}

// What lies in device regions is found, and what the host has to see of it comes here.
absl::Status BatchExecutor::TakeDeviceRows(int index, Shard& shard, BatchDone& done) {
  DeviceShard& on_device = slots_[index]->on_device;
  const std::int64_t row_bytes = RowBytes(shard, engine_->model());
  EPS_RETURN_IF_ERROR(on_device.Locate(shard, row_bytes, device_regions_.get()));
  if (on_device.rows().empty()) return absl::OkStatus();
  if (shard.routed) {
    const runtime::ShardInput on_host = InputOf(index, shard);
    return on_device.TakeRouting(shard, *engine_, on_host.topk_ids, on_host.topk_weights,
                                 done.region_faults);
  }
  if (!shard.in_arena) shard.hidden.resize(static_cast<std::size_t>(shard.num_tokens * row_bytes));
  std::byte* const rows =
      shard.in_arena ? RowsInArena(shard) : reinterpret_cast<std::byte*>(shard.hidden.data());
  return on_device.FetchHidden(shard, *engine_, row_bytes, rows);
}

// The output takes the place of the shard's rows in the arena, or goes into the message. Rows that
// are wanted in clients' regions go on from the arena, or, where no others are there, straight from
// where the engine has them. To device regions the engine has brought them itself.
absl::Status BatchExecutor::Finish(const Shard& shard, BatchDone& done) {
  void* output = shard.in_arena ? RowsInArena(shard) : nullptr;
  const std::byte* combined = nullptr;
  if (shard.num_tokens > 0 &&
      NumRowsWith(&DeviceRows::output, shard.device_rows) == shard.num_tokens) {
    output = nullptr;
  } else if (!shard.in_arena) {
    done.output.resize(
        static_cast<std::size_t>(shard.num_tokens * RowBytes(shard, engine_->model())));
    output = done.output.data();
  } else if (shard.num_tokens > 0 && NumRowsIn(shard.targets) == shard.num_tokens) {
    combined = engine_->CombinedRows(shard.slot);
  }
  if (combined != nullptr) {
    EPS_RETURN_IF_ERROR(WriteRegions(shard, combined, done));
    output = nullptr;
  }
  done.local_expert_rows.assign(placement_.num_local_experts(rank_), 0);
  EPS_RETURN_IF_ERROR(
      engine_->Finish(shard.slot, output, &done.times.engine, &done.local_expert_rows));
  DeviceShard::TellFaults(shard, engine_->model().num_experts, engine_->routing_faults(shard.slot),
                          done.region_faults);
  if (combined != nullptr || shard.targets.empty()) return absl::OkStatus();
  return WriteRegions(shard, RowsInArena(shard), done);
}

absl::Status BatchExecutor::WriteRegions(const Shard& shard, const std::byte* rows,
                                         BatchDone& done) {
  return regions_->WriteRows(
      shard.targets, RowBytes(shard, engine_->model()), rows,
      [this] { return CheckMayWriteRegions(); }, done.region_faults);
}

// A client that was told of a failure may use its region again: nothing is written there for an
// epoch that has ended, nor by a worker that was given up.
absl::Status BatchExecutor::CheckMayWriteRegions() const {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (state_ != EpochState::kRunning) {
      return absl::AbortedError("batch: its epoch ended before its output was written");
    }
  }
  return CheckLease("output");
}

absl::Status BatchExecutor::CheckLease(std::string_view phase) const {
  const std::int64_t now_us = config_.now_us();
  if (lease_->IsFreshAt(now_us)) return absl::OkStatus();
  const std::optional<std::int64_t> expires_us = lease_->expires_us();
  const std::string when =
      expires_us ? absl::StrCat("it ran out ", (now_us - *expires_us) / 1000, " ms ago")
                 : "none was given in this epoch";
  return absl::AbortedError(absl::StrCat(std::string(phase),
                                         ": the worker has no lease to touch its peers (", when,
                                         "); the coordinator forms a new epoch, retry"));
}

absl::Status BatchExecutor::WaitFor(Slot& slot, const bool& flag, std::string_view what) {
  const auto deadline =
      std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(config_.trigger_timeout);
  std::unique_lock<std::mutex> lock(mutex_);
  const bool woken = slot.changed.wait_until(
      lock, deadline, [&] { return flag || stopping_ || state_ == EpochState::kAborted; });
  if (stopping_ || state_ == EpochState::kAborted) {
    return absl::AbortedError(
        absl::StrCat("batch: its epoch ended while waiting for the ", std::string(what)));
  }
  if (!woken) {
    return absl::DeadlineExceededError(
        absl::StrCat("batch: the coordinator's ", std::string(what), " did not come within ",
                     absl::ToInt64Milliseconds(config_.trigger_timeout), " ms"));
  }
  return absl::OkStatus();
}

absl::Status BatchExecutor::ObtainCounts(int index, Batch& batch) {
  Shard& shard = batch.shard;
  if (shard.device_counts) {
    EPS_RETURN_IF_ERROR(CheckLease("counts"));
    EPS_ASSIGN_OR_RETURN(shard.counts, engine_->ExchangeCounts(index));
  } else {
    EPS_RETURN_IF_ERROR(WaitFor(*slots_[index], batch.counts_known, "count matrix"));
  }
  const bool came_along = batch.counts_came_along && !shard.device_counts;
  batch.done.times.counts_ns = came_along ? 0 : SteadyNowNs() - batch.staged_ns;
  return CheckCounts(shard, batch.staged, placement_, rank_, config_.max_batch_tokens);
}

// Up to where the counts are known here, and told to the coordinator where that asks for them.
absl::Status BatchExecutor::StageBatch(int index, Batch& batch) {
  const Shard& shard = batch.shard;
  BatchDone& done = batch.done;
  EPS_RETURN_IF_ERROR(Check(shard));
  if (!shard.sources.empty()) {
    done.region_faults =
        regions_->ReadRows(shard.sources, RowBytes(shard, engine_->model()), RowsInArena(shard));
  }
  EPS_RETURN_IF_ERROR(TakeDeviceRows(index, batch.shard, done));
  // Asked once: the coordinator may send the matrix unasked, while this thread is staging.
  batch.counts_came_along = CountsKnownNow(batch);
  EPS_ASSIGN_OR_RETURN(batch.staged, engine_->Stage(InputOf(index, shard)));
  batch.is_staged = true;
  batch.staged_ns = SteadyNowNs();
  done.times.assign_ns = batch.staged_ns - shard.received_ns;
  if (!batch.counts_came_along) {
    ReportUnlessAborted(shard.epoch, CountsReport{shard.epoch, shard.batch, batch.staged});
  }
  return absl::OkStatus();
}

absl::Status BatchExecutor::RunStaged(int index, Batch& batch) {
  const Shard& shard = batch.shard;
  // Where the counts go with the rows, nobody waits for them.
  const bool uncounted = shard.device_counts && engine_->dispatches_uncounted(shard.topk);
  if (!uncounted) EPS_RETURN_IF_ERROR(ObtainCounts(index, batch));
  if (shard.separate_triggers) {
    EPS_RETURN_IF_ERROR(WaitFor(*slots_[index], batch.dispatch_triggered, "dispatch trigger"));
  }
  EPS_RETURN_IF_ERROR(CheckLease("dispatch"));
  EPS_RETURN_IF_ERROR(uncounted ? engine_->DispatchUncounted(index)
                                : engine_->Dispatch(index, *shard.counts));
  EPS_RETURN_IF_ERROR(engine_->RunExperts(index));
  if (shard.separate_triggers) {
    ReportUnlessAborted(shard.epoch, DispatchDone{.epoch = shard.epoch, .batch = shard.batch});
    EPS_RETURN_IF_ERROR(WaitFor(*slots_[index], batch.combine_triggered, "combine trigger"));
  }
  EPS_RETURN_IF_ERROR(CheckLease("combine"));
  EPS_RETURN_IF_ERROR(engine_->Combine(index));
  return Finish(shard, batch.done);
}

bool BatchExecutor::CountsKnownNow(const Batch& batch) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return batch.counts_known;
}

bool BatchExecutor::ReportUnlessAborted(std::uint64_t epoch, WorkerMessage message) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (state_ != EpochState::kRunning || epoch != epoch_) return false;
  }
  reporter_->Report(std::move(message));
  return true;
}

}  // namespace epserve::worker
