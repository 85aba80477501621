#include "tests/server/coordinator/state_machine/simulation/sim_worker.h"

#include <algorithm>

namespace epserve::coordinator::sim {

SimWorker::SimWorker(World& world, Network& network, Exchanges& exchanges, const Config& config,
                     int index, std::function<int()> coordinator, bool device_counts)
    : world_(world),
      network_(network),
      exchanges_(exchanges),
      config_(config),
      id_(absl::StrCat("w", index)),
      coordinator_(std::move(coordinator)),
      device_counts_(device_counts),
      clock_offset_us_(world.Between(-1'000'000'000, 1'000'000'000)) {}

// ---- the process

void SimWorker::RunWhenAwake(std::uint64_t process, std::function<void()> action) {
  if (!alive_ || process != static_cast<std::uint64_t>(process_)) return;
  if (world_.now() >= paused_until_us_) return action();
  world_.At(paused_until_us_,
            [this, process, action = std::move(action)] { RunWhenAwake(process, action); });
}

void SimWorker::Later(TimeUs delay_us, std::function<void()> action) {
  world_.At(world_.now() + delay_us,
            [this, process = static_cast<std::uint64_t>(process_), action = std::move(action)] {
              RunWhenAwake(process, action);
            });
}

void SimWorker::LaterInEpoch(TimeUs delay_us, std::function<void()> action) {
  Later(delay_us, [this, membership = membership_, action = std::move(action)] {
    if (membership == membership_) action();
  });
}

void SimWorker::StartProcess() {
  alive_ = true;
  process_ = world_.next_process++;
  world_.offers_device_counts[process_] = device_counts_;
  paused_until_us_ = 0;
  stream_ = 0;
  held_rank_ = rank_ = -1;
  last_epoch_ = 0;
  lease_until_us_ = -kNever;
  shutting_down_ = false;
  AbortEpoch();
  world_.Trace(absl::StrCat(id_, " starts as process ", process_));
  Later(world_.Between(0, 20 * kMs), [this] { Connect(); });
}

void SimWorker::Kill() {
  if (!alive_) return;
  world_.Trace(absl::StrCat(id_, " dies"));
  alive_ = false;
  if (stream_ != 0) network_.Break(stream_);
  // A coordinator on this machine may see the process end, before or after the stream's end.
  if (world_.Chance(0.5)) {
    const ProcessEnded ended{id_, std::to_string(process_)};
    world_.At(world_.now() + world_.Between(0, 50 * kMs),
              [this, life = coordinator_(), ended] { network_.to_coordinator(life, ended); });
  }
  world_.At(world_.now() + world_.Between(1 * kMs, 200 * kMs), [this] { StartProcess(); });
}

void SimWorker::Pause(std::int64_t duration_us) {
  world_.Trace(absl::StrCat(id_, " is paused for ", duration_us));
  paused_until_us_ = std::max(paused_until_us_, world_.now() + duration_us);
}

void SimWorker::BreakStream() {
  if (stream_ != 0) network_.Break(stream_);
}

void SimWorker::Leave() {
  if (stream_ != 0) Send(WorkerLeaving{stream_, "SIGTERM"});
}

// ---- the stream

void SimWorker::Connect() {
  if (stream_ != 0) return;
  const int coordinator = coordinator_();
  if (coordinator == 0) {
    Later(world_.Between(5 * kMs, 30 * kMs), [this] { Connect(); });
    return;
  }
  const int process = process_;
  stream_ = network_.Open(coordinator, process_);
  const StreamId stream = stream_;
  network_.SetReceiver(stream, [this, stream, process](const ToWorker& message) {
    RunWhenAwake(static_cast<std::uint64_t>(process),
                 [this, stream, message] { Receive(stream, message); });
  });
  WorkerHello hello{stream_,     id_,        std::to_string(process_),
                    last_epoch_, held_rank_, held_rank_ < 0 ? 0 : config_.num_workers};
  hello.device_counts = device_counts_;
  hello.backend = world_.on_cpus ? "host" : "cuda";
  Send(hello);
  Heartbeats(stream_);
}

void SimWorker::Heartbeats(StreamId stream) {
  if (stream != stream_) return;
  Send(Heartbeat{stream_, epoch_, clock_us(), 1});
  Later(config_.lease_us / 4, [this, stream] { Heartbeats(stream); });
}

void SimWorker::Receive(StreamId stream, const ToWorker& message) {
  if (stream != stream_) return;
  std::visit([this](const auto& m) { On(m); }, message);
}

void SimWorker::On(const StreamLost&) {
  world_.Trace(absl::StrCat(id_, " lost its stream"));
  AbortEpoch();
  rank_ = -1;
  stream_ = 0;
  if (shutting_down_) return Kill();
  Later(world_.Between(5 * kMs, 50 * kMs), [this] { Connect(); });
}

void SimWorker::AbortEpoch() {
  epoch_ = 0;
  ++membership_;
  work_.clear();
}

void SimWorker::On(const RejectWorker& m) {
  world_.Fail("a sound worker was rejected: " + m.message);
}

void SimWorker::On(const SendShutdown&) {
  if (epoch_ != 0) world_.Fail(id_ + " was sent away while a member of an epoch");
  shutting_down_ = true;
  if (world_.Fault(0.1)) return;  // Hangs, until it is cut off.
  Later(world_.Between(0, 5 * kMs), [this] { Kill(); });
}

// ---- weights and epochs

void SimWorker::On(const AssignRank& m) {
  if (rank_ >= 0) world_.Fail(id_ + " was given a second rank on one stream");
  rank_ = m.rank;
  if (held_rank_ == m.rank) {
    Send(WorkerLoaded{stream_, m.rank, config_.num_workers, 1, 1});
    return;
  }
  held_rank_ = -1;
  Send(WorkerLoadProgress{stream_, 1, 2});
  const bool fails = world_.Fault(0.02);
  const StreamId stream = stream_;
  Later(world_.Between(1 * kMs, 40 * kMs), [this, stream, fails, rank = m.rank] {
    if (stream != stream_) return;  // Given up with the stream.
    if (fails) {
      Send(WorkerFailure{stream_, absl::StatusCode::kDataLoss, "damaged checkpoint"});
      return;
    }
    held_rank_ = rank;
    Send(WorkerLoaded{stream_, rank, config_.num_workers, 1, 1});
  });
}

void SimWorker::On(const SendCreateHeap& m) {
  if (epoch_ != 0) world_.Fail(id_ + " was told CreateHeap while a member of an epoch");
  if (m.epoch <= last_epoch_) world_.Fail(id_ + " was told an epoch that is not new");
  AbortEpoch();
  epoch_ = last_epoch_ = m.epoch;
  lease_until_us_ = -kNever;
  Send(Heartbeat{stream_, epoch_, clock_us(), 1});
  if (world_.Fault(0.01)) return;  // Hangs.
  if (world_.Fault(0.01)) {
    Send(WorkerFailure{stream_, absl::StatusCode::kResourceExhausted, "no shared memory"});
    return;
  }
  LaterInEpoch(world_.Between(0, 3 * kMs), [this] {
    Send(HeapCreated{stream_, epoch_, absl::StrCat(process_, "/", epoch_)});
  });
}

void SimWorker::On(const SendOpenPeers& m) {
  if (m.epoch != epoch_) return;
  const std::vector<int>& members = world_.members[epoch_];
  for (std::size_t rank = 0; rank < members.size(); ++rank) {
    if (m.handles.at(rank) != absl::StrCat(members[rank], "/", epoch_)) {
      world_.Fail(
          absl::StrCat("the handle of rank ", rank, " in epoch ", epoch_, " is ", m.handles[rank]));
    }
  }
  if (world_.Fault(0.01)) return;  // Hangs.
  LaterInEpoch(world_.Between(0, 3 * kMs), [this] { Send(PeersOpened{stream_, epoch_}); });
}

void SimWorker::On(const SendEpochStarted& m) {
  if (m.epoch != epoch_) return;
  if (world_.Fault(0.02)) {  // Gives the epoch up by itself.
    LaterInEpoch(world_.Between(0, 100 * kMs), [this] {
      const EpochId epoch = epoch_;
      AbortEpoch();
      Send(EpochQuiesced{stream_, epoch});
    });
  }
}

void SimWorker::On(const SendEpochEnded& m) {
  if (m.epoch != epoch_) return;
  AbortEpoch();
  if (world_.Fault(0.01)) return;  // Hangs.
  const StreamId stream = stream_;
  Later(world_.Between(0, 5 * kMs), [this, stream, epoch = m.epoch] {
    if (stream == stream_) Send(EpochQuiesced{stream_, epoch});
  });
}

void SimWorker::On(const GrantLease& m) {
  if (m.epoch == epoch_) lease_until_us_ = std::max(lease_until_us_, m.echo_us + m.duration_us);
}

// ---- batches

void SimWorker::On(const ShardMessage& m) {
  if (m.epoch != epoch_) return;
  for (const auto& [batch, work] : work_) {
    if (work.slot == m.slot) {
      world_.Fail(absl::StrCat(id_, " got batch ", m.batch, " for slot ", m.slot, " which batch ",
                               batch, " still uses"));
    }
  }
  Work& work = work_[m.batch];
  work.slot = m.slot;
  work.counts = m.counts;
  work.counted = m.counts == CountExchange::kCoordinator;
  work.separate = m.trigger == TriggerMode::kSeparate;
  work.num_tokens = m.num_tokens;
  const TimeUs delay_us =
      world_.Fault(0.05) ? world_.Between(0, 150 * kMs) : world_.Between(10, 1000);
  LaterInEpoch(delay_us, [this, batch = m.batch] {
    Work* work = WorkOf(epoch_, batch);
    if (work == nullptr) return;
    if (world_.Fault(0.005)) return Done(batch, absl::StatusCode::kInternal, "staging failed");
    work->staged = true;
    if (work->counts == CountExchange::kStreams) {
      Counts counts{stream_, epoch_, batch};
      const bool bad = world_.Fault(0.005);
      counts.rows_to_rank.assign(config_.num_workers, bad ? -1 : 0);
      counts.rows_per_expert.assign(config_.num_experts, 0);
      Send(counts);
    }
    Advance(batch);
  });
}

SimWorker::Work* SimWorker::WorkOf(EpochId epoch, BatchId batch) {
  if (epoch == 0 || epoch != epoch_) return nullptr;
  auto it = work_.find(batch);
  return it == work_.end() ? nullptr : &it->second;
}

void SimWorker::On(const MatrixMessage& m) {
  if (Work* work = WorkOf(m.epoch, m.batch)) {
    if (!work->staged) world_.Fail("a count matrix came before this rank's counts");
    if (work->counts != CountExchange::kStreams) world_.Fail("a count matrix came unasked for");
    work->counted = true;
    Advance(m.batch);
  }
}

void SimWorker::On(const DispatchMessage& m) {
  if (Work* work = WorkOf(m.epoch, m.batch)) {
    work->dispatch_allowed = true;
    Advance(m.batch);
  }
}

void SimWorker::On(const CombineMessage& m) {
  if (Work* work = WorkOf(m.epoch, m.batch)) {
    if (!work->computed) world_.Fail("a combine trigger came before this rank's dispatch was done");
    work->combine_allowed = true;
    Advance(m.batch);
  }
}

void SimWorker::OnFlags(EpochId epoch, BatchId batch) {
  if (WorkOf(epoch, batch) == nullptr) return;
  LaterInEpoch(0, [this, batch] { Advance(batch); });
}

void SimWorker::Advance(BatchId batch) {
  Work* work = WorkOf(epoch_, batch);
  if (work == nullptr || !work->staged) return;
  if (work->counts == CountExchange::kDevice && !work->told_counts) {
    return ExchangeCounts(batch, *work);
  }
  if (work->counts == CountExchange::kDevice && !work->counted) {
    work->counted = Everyone(exchanges_.flags[{epoch_, batch}].counted);
  }
  if (!work->counted) return;
  if (work->separate && !work->dispatch_allowed) return;
  if (!work->dispatched) return Dispatch(batch, *work);
  const Exchanges::Flags& flags = exchanges_.flags[{epoch_, batch}];
  if (!work->computing && Everyone(flags.dispatched)) {
    work->computing = true;
    LaterInEpoch(world_.Between(10, 2000), [this, batch] {
      Work* work = WorkOf(epoch_, batch);
      if (work == nullptr) return;
      work->computed = true;
      if (work->separate) Send(PhaseDone{stream_, epoch_, batch, Phase::kDispatch});
      Advance(batch);
    });
  }
  if (!work->computed || (work->separate && !work->combine_allowed)) return;
  if (!work->combined) return Combine(batch, *work);
  if (Everyone(flags.combined)) {
    if (!LeaseIsFresh()) return Done(batch, absl::StatusCode::kAborted, "the lease ran out");
    world_.done_ok[{epoch_, batch}].insert(rank_);
    Done(batch, absl::StatusCode::kOk, "");
  }
}

void SimWorker::ExchangeCounts(BatchId batch, Work& work) {
  if (!LeaseIsFresh()) return Done(batch, absl::StatusCode::kAborted, "the lease ran out");
  world_.Touch(epoch_, process_);
  work.told_counts = true;
  exchanges_.flags[{epoch_, batch}].counted.insert(rank_);
  LaterInEpoch(kPeerTimeoutUs, [this, batch] {
    const Work* work = WorkOf(epoch_, batch);
    if (work != nullptr && !work->counted) {
      Done(batch, absl::StatusCode::kDeadlineExceeded, "a peer's counts did not come");
    }
  });
  RaiseFlags(batch);
}

void SimWorker::Dispatch(BatchId batch, Work& work) {
  if (!LeaseIsFresh()) return Done(batch, absl::StatusCode::kAborted, "the lease ran out");
  world_.Touch(epoch_, process_);
  work.dispatched = true;
  exchanges_.flags[{epoch_, batch}].dispatched.insert(rank_);
  LaterInEpoch(kPeerTimeoutUs, [this, batch] {
    if (WorkOf(epoch_, batch) != nullptr) {
      Done(batch, absl::StatusCode::kDeadlineExceeded, "a peer did not come");
    }
  });
  RaiseFlags(batch);
}

void SimWorker::Combine(BatchId batch, Work& work) {
  if (!LeaseIsFresh()) return Done(batch, absl::StatusCode::kAborted, "the lease ran out");
  world_.Touch(epoch_, process_);
  work.combined = true;
  exchanges_.flags[{epoch_, batch}].combined.insert(rank_);
  RaiseFlags(batch);
}

void SimWorker::RaiseFlags(BatchId batch) {
  for (SimWorker* worker : exchanges_.workers) worker->OnFlags(epoch_, batch);
}

void SimWorker::Done(BatchId batch, absl::StatusCode code, const std::string& message) {
  work_.erase(batch);
  Send(BatchDone{stream_, epoch_, batch, code, message});
}

}  // namespace epserve::coordinator::sim
