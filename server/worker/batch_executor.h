// Runs batches: one thread a slot, and for small batches whoever brings them, take a slot's shards
// through Stage, Dispatch, RunExperts, Combine and Finish, and wait in between for what the
// coordinator still owes (count matrix, dispatch trigger, combine trigger). Where a shard says so,
// the ranks exchange the counts among themselves, and the matrix is not waited for. A small batch
// that owes its matrix to the coordinator is parked meanwhile: no thread has it, and whoever brings
// the matrix runs the rest. It ends with its epoch at the latest, which the coordinator ends where
// ranks do not count in time.
//
//   closed ─OpenEpoch─► open (shards are held) ─StartEpoch─► running ─AbortEpoch─► aborted ─Drain─►
//   closed
//
// Thread-safe; no call blocks but Drain, RefuseWhenIdle and, for a small batch, Submit and
// SetCounts. Whatever carries another epoch than the present one is dropped. After AbortEpoch no
// new report of the epoch is begun, and after Drain none is under way and the engine is not in use.
#ifndef EPSERVE_SERVER_WORKER_BATCH_EXECUTOR_H_
#define EPSERVE_SERVER_WORKER_BATCH_EXECUTOR_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/engine/engine.h"
#include "runtime/symmetric/row_arena.h"
#include "server/worker/control_messages.h"
#include "server/worker/device_shard.h"
#include "server/worker/lease.h"
#include "server/worker/looked_for_flag.h"
#include "server/worker/open_device_regions.h"
#include "server/worker/region_files.h"

namespace epserve::worker {

// Called by the threads that run batches, several at once; must not block for long.
class BatchReporter {
 public:
  virtual ~BatchReporter() = default;
  virtual void Report(WorkerMessage message) = 0;
  // A batch was stopped because the lease had run out; its epoch is aborted already.
  virtual void OnLeaseExpired(std::uint64_t epoch) = 0;
};

class BatchExecutor {
 public:
  struct Config {
    int num_slots = 2;
    std::int64_t max_batch_tokens = 0;
    // Longest wait for the coordinator's next word on a batch.
    absl::Duration trigger_timeout = absl::Seconds(30);
    // How long a slot's thread looks for its next batch before it sleeps.
    std::chrono::nanoseconds busy_poll{0};
    // Steady clock that the lease is held against, microseconds.
    std::function<std::int64_t()> now_us;
  };

  // All must outlive the executor.
  BatchExecutor(const Config& config, runtime::Engine* engine, const Lease* lease,
                BatchReporter* reporter);
  // Aborts what runs and waits for it.
  ~BatchExecutor();
  BatchExecutor(const BatchExecutor&) = delete;
  BatchExecutor& operator=(const BatchExecutor&) = delete;

  // `row_arena`: where shards that say so have their rows; null: none may say so. `regions`: where
  // rows of such shards may come from and go to; null: they may not. `device_regions`: what device
  // rows lie in; null: no shard may have any. REQUIRES: closed.
  void OpenEpoch(std::uint64_t epoch, const runtime::Placement& placement, int rank,
                 std::shared_ptr<runtime::RowArena> row_arena,
                 std::shared_ptr<RegionFiles> regions = nullptr,
                 std::shared_ptr<const OpenDeviceRegions> device_regions = nullptr);
  void StartEpoch(std::uint64_t epoch);
  // Ends every wait here and in the engine. False, and nothing done, where `epoch` is not the
  // present one.
  bool AbortEpoch(std::uint64_t epoch);
  void AbortAnyEpoch();
  // Waits for the slots to leave the engine. REQUIRES: aborted or closed.
  void Drain();

  // Has a slot's thread run it; or, where the engine allows that, it is small, needs nothing more
  // of the coordinator, and nothing else is held, runs it before returning: that saves waking a
  // thread, and may take up to the peers' timeout.
  void Submit(Shard shard);
  // May run the batch, as Submit.
  void SetCounts(CountsKnown known);
  void Trigger(const DispatchTrigger& trigger);
  void Trigger(const CombineTrigger& trigger);
  // These regions are gone.
  void Forget(const ForgetRegions& gone);

  // Waits until no batch is held or runs; from then on shards are refused with UNAVAILABLE. False,
  // with shards refused all the same, if that took longer than `timeout`.
  bool RefuseWhenIdle(absl::Duration timeout);

  std::uint64_t batches_done() const;

 private:
  enum class EpochState { kClosed, kOpen, kRunning, kAborted };

  enum class Holder {
    kThread,     // one runs it, or will take it from the queue
    kNobody,     // parked, until its count matrix comes
    kSlotsNext,  // the matrix has come, and the slot's thread is to go on with it
  };

  struct Batch {
    Shard shard;
    bool counts_known = false;  // the coordinator owes no count matrix
    bool dispatch_triggered = false;
    bool combine_triggered = false;
    bool may_park = false;
    Holder holder = Holder::kThread;
    // Of the thread that holds it alone.
    bool is_staged = false;
    bool counts_came_along = false;
    runtime::ShardCounts staged;
    std::int64_t staged_ns = 0;
    BatchDone done;
  };

  struct Slot {
    std::condition_variable changed;
    LookedForFlag has_work;
    std::unique_ptr<Batch> queued;   // Guarded by mutex_, as all here.
    std::unique_ptr<Batch> running;  // Only its flags, holder and counts are guarded.
    DeviceShard on_device;           // Of the thread that runs the batch alone.
    std::thread thread;
  };

  void RunSlot(int index);
  bool MayRunHere(const Shard& shard) const;
  void RunTaken(int index);
  void EndBatch(Slot& slot);
  // Runs the batch, or what is left of it. False: it is parked.
  bool Execute(int index, Batch& batch);
  bool Parks(Batch& batch);
  absl::Status StageBatch(int index, Batch& batch);
  absl::Status RunStaged(int index, Batch& batch);
  absl::Status CheckSlot(const Shard& shard) const;
  absl::Status Check(const Shard& shard) const;
  std::byte* RowsInArena(const Shard& shard) const;
  absl::Status TakeDeviceRows(int index, Shard& shard, BatchDone& done);
  runtime::ShardInput InputOf(int index, const Shard& shard) const;
  absl::Status Finish(const Shard& shard, BatchDone& done);
  absl::Status WriteRegions(const Shard& shard, const std::byte* rows, BatchDone& done);
  absl::Status CheckMayWriteRegions() const;
  absl::Status CheckLease(std::string_view phase) const;
  bool CountsKnownNow(const Batch& batch) const;
  // Has the count matrix in the shard, however it is to be had.
  absl::Status ObtainCounts(int index, Batch& batch);
  absl::Status WaitFor(Slot& slot, const bool& flag, std::string_view what);
  bool AbortLocked();
  bool IdleBut(const Slot* apart) const;  // null: none is apart
  Batch* Find(std::uint64_t epoch, std::uint64_t batch, Slot** slot);
  bool ReportUnlessAborted(std::uint64_t epoch, WorkerMessage message);

  const Config config_;
  runtime::Engine* const engine_;
  const Lease* const lease_;
  BatchReporter* const reporter_;

  mutable std::mutex mutex_;
  std::condition_variable idle_changed_;
  EpochState state_ = EpochState::kClosed;  // Guarded by mutex_, as all below.
  std::uint64_t epoch_ = 0;
  // Written while closed only, so slot threads read them without the lock.
  runtime::Placement placement_;
  int rank_ = 0;
  std::shared_ptr<runtime::RowArena> row_arena_;
  std::shared_ptr<RegionFiles> regions_;
  std::shared_ptr<const OpenDeviceRegions> device_regions_;
  bool refusing_ = false;
  bool stopping_ = false;
  std::uint64_t batches_done_ = 0;
  std::vector<std::unique_ptr<Slot>> slots_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_BATCH_EXECUTOR_H_
