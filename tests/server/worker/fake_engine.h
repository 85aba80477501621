// An engine that computes nothing: it records what it is told, lets a test hold any step, and
// complains (violations) where the daemon breaks the engine's contract. A batch's output is its
// input. Thread-safe.
#ifndef EPSERVE_TESTS_SERVER_WORKER_FAKE_ENGINE_H_
#define EPSERVE_TESTS_SERVER_WORKER_FAKE_ENGINE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "runtime/engine/engine.h"

namespace epserve::worker {

// Device memory that is the test's own: a handle leads to the bytes that were shared under it.
class FakeDeviceRegions : public runtime::DeviceRegions {
 public:
  // `handle` leads to `bytes` from now on.
  void Share(const std::string& handle, std::string* bytes) { shared_[handle] = bytes; }
  int num_open() const { return *num_open_; }
  absl::StatusOr<std::shared_ptr<const runtime::DeviceRegion>> Open(
      const runtime::DeviceRegionSpec& spec) override;

 private:
  std::map<std::string, std::string*> shared_;
  const std::shared_ptr<std::atomic<int>> num_open_ = std::make_shared<std::atomic<int>>(0);
};

class FakeEngine : public runtime::Engine {
 public:
  static constexpr std::int64_t kHidden = 4;
  static constexpr std::int64_t kExperts = 8;
  static constexpr int kTopk = 2;
  static constexpr std::int64_t kFirstLayer = 3;

  FakeEngine();

  // The named step ("load", "stage 0", "dispatch 1", ...) waits until Release, or, but for "load",
  // until Abort, which makes it fail with ABORTED.
  void Hold(const std::string& step);
  void Release(const std::string& step);
  // The named step fails with `status` from now on; OK: no longer.
  void FailAt(const std::string& step, absl::Status status);
  // Returns once the step has begun `times` times; false after sixty seconds.
  bool AwaitStep(const std::string& step, int times = 1);

  std::vector<std::string> calls() const;
  int Count(const std::string& step) const;
  std::vector<std::string> violations() const;
  // Whether ranks exchange counts among themselves; set before the engine is used. The fake's peers
  // have nothing to send.
  void set_exchanges_counts(bool exchanges) { exchanges_counts_ = exchanges; }
  // Whether batches may go without a count matrix, up to kTopk; set before the engine is used.
  void set_dispatches_uncounted(bool dispatches) { dispatches_uncounted_ = dispatches; }
  // What the slot's batch is told to have had wrong in device memory, from now on.
  void set_routing_faults(std::vector<runtime::RoutingFault> faults) {
    routing_faults_ = std::move(faults);
  }
  // Of the last shard staged.
  std::vector<runtime::ShardDeviceRows> staged_device_rows() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return staged_device_rows_;
  }
  // Whether small batches may run in the thread that brings them; set before the engine is used.
  void set_runs_on_any_thread(bool runs) { runs_on_any_thread_ = runs; }
  // Whether it takes rows of shared batches; set before the engine is used.
  void set_takes_shared_batches(bool takes) { takes_shared_batches_ = takes; }
  void set_plan(const runtime::MemoryPlan& plan) { plan_ = plan; }
  void set_held_host_bytes(std::uint64_t bytes) { held_host_bytes_ = bytes; }
  std::uint64_t held_host_bytes() const override { return held_host_bytes_; }

  // What device_regions() is from now on, before the engine is used.
  void set_device_regions(FakeDeviceRegions* regions) { device_regions_ = regions; }

  // Of the last shard staged.
  std::vector<std::int32_t> staged_ids() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return staged_ids_;
  }
  std::vector<float> staged_weights() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return staged_weights_;
  }

  // The same: a copy of its shard_begin, and its rows.
  std::pair<std::vector<std::int64_t>, const void*> staged_shared() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return staged_shared_;
  }

  // What CombinedRows points to from now on; empty: it gives nothing.
  void set_combined(std::string rows) { combined_ = std::move(rows); }

  std::string_view backend() const override { return "host"; }
  const runtime::ModelInfo& model() const override { return model_; }
  bool runs_on_any_thread() const override { return runs_on_any_thread_; }
  bool takes_shared_batches() const override { return takes_shared_batches_; }
  absl::StatusOr<runtime::MemoryPlan> PlanMemory(const runtime::Placement& placement,
                                                 int rank) const override;
  absl::Status LoadExperts(
      const runtime::Placement& placement, int rank,
      const std::function<void(std::uint64_t, std::uint64_t)>& progress) override;
  absl::StatusOr<std::string> CreateHeap(std::uint64_t epoch) override;
  std::string handle_type() const override { return "fake"; }
  absl::Status OpenPeers(std::span<const std::string> handles) override;
  runtime::DeviceRegions* device_regions() override { return device_regions_; }
  absl::Status ReadDevice(int slot, std::span<const runtime::DeviceRead> reads) override;
  void SealHeap() override;
  void Abort() override;
  void CloseEpoch() override;
  absl::StatusOr<std::vector<float>> ReferenceExpert(std::int64_t layer, std::int64_t expert,
                                                     std::span<const float> x) const override;
  absl::StatusOr<runtime::ShardCounts> Stage(const runtime::ShardInput& input) override;
  bool exchanges_counts() const override { return exchanges_counts_; }
  absl::StatusOr<runtime::CountMatrix> ExchangeCounts(int slot) override;
  absl::Status Dispatch(int slot, const runtime::CountMatrix& counts) override;
  bool dispatches_uncounted(int topk) const override {
    return dispatches_uncounted_ && topk <= kTopk;
  }
  absl::Status DispatchUncounted(int slot) override;
  std::span<const runtime::RoutingFault> routing_faults(int /*slot*/) const override {
    return routing_faults_;
  }
  absl::Status RunExperts(int slot) override;
  absl::Status Combine(int slot) override;
  const std::byte* CombinedRows(int /*slot*/) const override {
    return combined_.empty() ? nullptr : reinterpret_cast<const std::byte*>(combined_.data());
  }
  absl::Status Finish(int slot, void* output, runtime::BatchTimes* times,
                      std::vector<std::int64_t>* local_expert_rows) override;
  void Discard(int slot) override;

 private:
  absl::Status Step(const std::string& step);

  const runtime::ModelInfo model_;
  runtime::MemoryPlan plan_;
  std::uint64_t held_host_bytes_ = 0;
  bool exchanges_counts_ = true;
  bool dispatches_uncounted_ = false;
  std::vector<runtime::RoutingFault> routing_faults_;
  bool runs_on_any_thread_ = false;
  bool takes_shared_batches_ = true;
  std::string combined_;
  FakeDeviceRegions* device_regions_ = nullptr;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::vector<std::string> calls_;  // Guarded by mutex_, as all below.
  std::vector<std::string> violations_;
  std::set<std::string> held_;
  std::map<std::string, absl::Status> failures_;
  bool aborted_ = false;
  bool heap_ = false;
  runtime::Placement placement_;
  int rank_ = -1;
  std::map<int, runtime::ShardInput> staged_;
  std::map<int, runtime::ShardCounts> counted_;
  std::pair<std::vector<std::int64_t>, const void*> staged_shared_;
  std::vector<std::int32_t> staged_ids_;
  std::vector<float> staged_weights_;
  std::vector<runtime::ShardDeviceRows> staged_device_rows_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_TESTS_SERVER_WORKER_FAKE_ENGINE_H_
