#include "tests/server/worker/fake_engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "runtime/base/status.h"

namespace epserve::worker {

namespace {

class FakeDeviceRegion : public runtime::DeviceRegion {
 public:
  FakeDeviceRegion(std::string* bytes, std::shared_ptr<std::atomic<int>> num_open)
      : bytes_(bytes), num_open_(std::move(num_open)) {
    ++*num_open_;
  }
  ~FakeDeviceRegion() override { --*num_open_; }
  std::byte* data() const override { return reinterpret_cast<std::byte*>(bytes_->data()); }

 private:
  std::string* const bytes_;
  const std::shared_ptr<std::atomic<int>> num_open_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const runtime::DeviceRegion>> FakeDeviceRegions::Open(
    const runtime::DeviceRegionSpec& spec) {
  const auto found = shared_.find(spec.handle);
  if (found == shared_.end()) return absl::FailedPreconditionError("open region: stale handle");
  if (spec.size_bytes > found->second->size()) {
    return absl::InvalidArgumentError("open region: byte_size exceeds the allocation");
  }
  return std::make_shared<const FakeDeviceRegion>(found->second, num_open_);
}

FakeEngine::FakeEngine()
    : model_{.fingerprint = "f00d",
             .architecture = "mixtral",
             .hidden = kHidden,
             .intermediate = 8,
             .num_experts = kExperts,
             .topk = kTopk,
             .layers = {kFirstLayer, kFirstLayer + 1},
             .has_router = true},
      plan_{.weight_bytes = 1000, .heap_bytes = 200, .workspace_bytes = 30, .held_type = "fp32"} {}

void FakeEngine::Hold(const std::string& step) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_.insert(step);
}

void FakeEngine::Release(const std::string& step) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_.erase(step);
  changed_.notify_all();
}

void FakeEngine::FailAt(const std::string& step, absl::Status status) {
  std::lock_guard<std::mutex> lock(mutex_);
  failures_[step] = std::move(status);
}

bool FakeEngine::AwaitStep(const std::string& step, int times) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(60),
                           [&] { return std::count(calls_.begin(), calls_.end(), step) >= times; });
}

std::vector<std::string> FakeEngine::calls() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return calls_;
}

int FakeEngine::Count(const std::string& step) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(std::count(calls_.begin(), calls_.end(), step));
}

std::vector<std::string> FakeEngine::violations() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return violations_;
}

absl::Status FakeEngine::Step(const std::string& step) {
  std::unique_lock<std::mutex> lock(mutex_);
  calls_.push_back(step);
  changed_.notify_all();
  const bool abortable = step != "load";
  changed_.wait(lock, [&] { return !held_.contains(step) || (abortable && aborted_); });
  if (abortable && aborted_ && held_.contains(step)) {
    return absl::AbortedError(absl::StrCat(step, ": aborted"));
  }
  const auto failure = failures_.find(step);
  if (failure == failures_.end()) return absl::OkStatus();
  // A status of its own: the reference count of a shared one is not seen by ThreadSanitizer.
  return absl::Status(failure->second.code(), failure->second.message());
}

absl::StatusOr<runtime::MemoryPlan> FakeEngine::PlanMemory(const runtime::Placement&, int) const {
  return plan_;
}

absl::Status FakeEngine::LoadExperts(
    const runtime::Placement& placement, int rank,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  progress(0, 1000);
  EPS_RETURN_IF_ERROR(Step("load"));
  progress(1000, 1000);
  std::lock_guard<std::mutex> lock(mutex_);
  placement_ = placement;
  rank_ = rank;
  return absl::OkStatus();
}

absl::StatusOr<std::string> FakeEngine::CreateHeap(std::uint64_t epoch) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (heap_) violations_.push_back("CreateHeap with a heap there");
    if (!staged_.empty()) violations_.push_back("CreateHeap with a batch staged");
    aborted_ = false;
    heap_ = true;
  }
  EPS_RETURN_IF_ERROR(Step("create"));
  return absl::StrCat("heap-", epoch);
}

absl::Status FakeEngine::OpenPeers(std::span<const std::string> handles) {
  return Step(absl::StrCat("open ", absl::StrJoin(handles, ",")));
}

absl::Status FakeEngine::ReadDevice(int slot, std::span<const runtime::DeviceRead> reads) {
  for (const runtime::DeviceRead& read : reads) {
    std::memcpy(read.destination, read.source, read.bytes);
  }
  return Step(absl::StrCat("read ", slot));
}

void FakeEngine::SealHeap() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!staged_.empty()) violations_.push_back("SealHeap with a batch staged");
  calls_.push_back("seal");
  changed_.notify_all();
}

void FakeEngine::Abort() {
  std::lock_guard<std::mutex> lock(mutex_);
  aborted_ = true;
  calls_.push_back("abort");
  changed_.notify_all();
}

void FakeEngine::CloseEpoch() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!staged_.empty()) violations_.push_back("CloseEpoch with a batch staged");
  heap_ = false;
  calls_.push_back("close");
  changed_.notify_all();
}

absl::StatusOr<std::vector<float>> FakeEngine::ReferenceExpert(std::int64_t layer,
                                                               std::int64_t expert,
                                                               std::span<const float> x) const {
  std::vector<float> output(x.begin(), x.end());
  output[0] = static_cast<float>(100 * layer + expert);
  return output;
}

absl::StatusOr<runtime::ShardCounts> FakeEngine::Stage(const runtime::ShardInput& input) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!heap_) violations_.push_back("Stage without a heap");
    if (staged_.contains(input.slot)) violations_.push_back("Stage on a slot that is taken");
    staged_[input.slot] = input;
  }
  EPS_RETURN_IF_ERROR(Step(absl::StrCat("stage ", input.slot)));
  // Where the ids are absent the router sends every token to expert 0.
  std::vector<std::int32_t> ids(input.num_tokens * input.topk, -1);
  for (std::int64_t t = 0; t < input.num_tokens; ++t) ids[t * input.topk] = 0;
  if (input.topk_ids != nullptr) std::copy_n(input.topk_ids, ids.size(), ids.begin());
  std::lock_guard<std::mutex> lock(mutex_);
  staged_ids_ = ids;
  staged_shared_ = {{input.shared.shard_begin.begin(), input.shared.shard_begin.end()},
                    input.shared.x};
  staged_device_rows_.assign(input.device_rows.begin(), input.device_rows.end());
  if (input.topk_weights != nullptr) {
    staged_weights_.assign(input.topk_weights, input.topk_weights + ids.size());
  }
  runtime::ShardCounts counts;
  counts.rows_to_rank.resize(placement_.num_ranks());
  counts.rows_per_expert.resize(kExperts);
  runtime::CountShard(ids, input.topk, placement_, counts.rows_to_rank, counts.rows_per_expert);
  counted_[input.slot] = counts;
  return counts;
}

absl::StatusOr<runtime::CountMatrix> FakeEngine::ExchangeCounts(int slot) {
  if (!exchanges_counts_) return Engine::ExchangeCounts(slot);
  EPS_RETURN_IF_ERROR(Step(absl::StrCat("counts ", slot)));
  std::lock_guard<std::mutex> lock(mutex_);
  if (!staged_.contains(slot)) violations_.push_back("ExchangeCounts of nothing staged");
  const runtime::ShardCounts& own = counted_.at(slot);
  const int num_ranks = placement_.num_ranks();
  runtime::CountMatrix matrix{.num_ranks = num_ranks, .rows_per_expert = own.rows_per_expert};
  matrix.rows.resize(static_cast<std::size_t>(num_ranks * num_ranks));
  std::copy(own.rows_to_rank.begin(), own.rows_to_rank.end(),
            matrix.rows.begin() + rank_ * num_ranks);
  return matrix;
}

absl::Status FakeEngine::Dispatch(int slot, const runtime::CountMatrix& counts) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!staged_.contains(slot)) violations_.push_back("Dispatch of nothing staged");
    if (counts.num_ranks != placement_.num_ranks()) violations_.push_back("Dispatch: wrong counts");
  }
  return Step(absl::StrCat("dispatch ", slot));
}

absl::Status FakeEngine::DispatchUncounted(int slot) {
  if (!dispatches_uncounted_) return Engine::DispatchUncounted(slot);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!staged_.contains(slot)) violations_.push_back("DispatchUncounted of nothing staged");
  }
  return Step(absl::StrCat("uncounted ", slot));
}

absl::Status FakeEngine::RunExperts(int slot) { return Step(absl::StrCat("experts ", slot)); }

absl::Status FakeEngine::Combine(int slot) { return Step(absl::StrCat("combine ", slot)); }

absl::Status FakeEngine::Finish(int slot, void* output, runtime::BatchTimes* times,
                                std::vector<std::int64_t>* local_expert_rows) {
  EPS_RETURN_IF_ERROR(Step(absl::StrCat("finish ", slot)));
  std::lock_guard<std::mutex> lock(mutex_);
  const runtime::ShardInput& input = staged_.at(slot);
  if (output == nullptr && combined_.empty() &&
      runtime::NumOutputIn(input.device_rows) < input.num_tokens) {
    violations_.push_back(absl::StrCat("finish ", slot, " without a place for the output"));
  }
  const std::size_t row_bytes = kHidden * runtime::DataTypeBytes(input.dtype);
  std::string rows(input.num_tokens * row_bytes, '?');
  if (input.hidden != nullptr) std::memcpy(rows.data(), input.hidden, rows.size());
  for (const runtime::ShardDeviceRows& part : input.device_rows) {
    char* const of_part = rows.data() + part.first_row * row_bytes;
    if (part.hidden != nullptr) std::memcpy(of_part, part.hidden, part.num_rows * row_bytes);
    if (part.output != nullptr) std::memcpy(part.output, of_part, part.num_rows * row_bytes);
  }
  // The output may take the input's place.
  if (output != nullptr) std::memcpy(output, rows.data(), rows.size());
  *times = {.dispatch_ns = 11, .ffn_ns = 22, .combine_ns = 33};
  local_expert_rows->assign(placement_.num_local_experts(rank_), input.num_tokens);
  staged_.erase(slot);
  return absl::OkStatus();
}

void FakeEngine::Discard(int slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  staged_.erase(slot);
  calls_.push_back(absl::StrCat("discard ", slot));
  changed_.notify_all();
}

}  // namespace epserve::worker
