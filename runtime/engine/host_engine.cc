// The engine of the host backend: HostExchange for dispatch and combine, ExpertFfn for the experts,
// the router where a shard comes without ids. See engine.h for life cycle and thread safety.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/engine/batch_slot.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/engine_base.h"
#include "runtime/engine/epoch_exchange.h"
#include "runtime/experts/expert_ffn.h"
#include "runtime/symmetric/stale_heaps.h"

namespace epserve::runtime {
namespace {

std::int64_t ElapsedNs(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() -
                                                              since)
      .count();
}

class HostEngine final : public EngineBase {
 public:
  HostEngine(const EngineOptions& options, std::unique_ptr<Checkpoint> checkpoint)
      : EngineBase(options, std::move(checkpoint)) {}

  std::string_view backend() const override { return "host"; }
  bool runs_on_any_thread() const override { return true; }

  absl::StatusOr<MemoryPlan> PlanMemory(const Placement& placement, int rank) const override;
  std::uint64_t held_host_bytes() const override { return held_bytes_; }
  absl::Status LoadExperts(
      const Placement& placement, int rank,
      const std::function<void(std::uint64_t, std::uint64_t)>& progress) override;

  absl::StatusOr<std::string> CreateHeap(std::uint64_t epoch) override;
  std::string handle_type() const override { return exchange_.handle_type(); }
  absl::Status OpenPeers(std::span<const std::string> handles) override;
  void SealHeap() override;
  void Abort() override { exchange_.Abort(); }
  void CloseEpoch() override;

  absl::StatusOr<std::vector<float>> ReferenceExpert(std::int64_t layer, std::int64_t expert,
                                                     std::span<const float> x) const override;

  bool exchanges_counts() const override { return true; }
  bool takes_shared_batches() const override { return true; }
  absl::StatusOr<CountMatrix> ExchangeCounts(int slot) override;
  absl::Status Dispatch(int slot, const CountMatrix& counts) override;
  absl::Status RunExperts(int slot) override;
  absl::Status Combine(int slot) override;
  const std::byte* CombinedRows(int slot) const override;
  absl::Status Finish(int slot, void* output, BatchTimes* times,
                      std::vector<std::int64_t>* local_expert_rows) override;
  void Discard(int slot) override;

 private:
  absl::Status StageSlot(ShardSlot& slot) override;
  ShardSlot& SlotAt(int slot) override { return *slots_[static_cast<std::size_t>(slot)]; }
  BatchSlotConfig MakeSlotConfig(const Placement& placement, int rank) const;
  absl::StatusOr<BatchSlot*> BatchIn(const char* operation, int slot, BatchSlot::State wanted);

  // Set by LoadExperts, read by batches.
  ExpertWeights weights_;
  std::uint64_t held_bytes_ = 0;  // by weights_
  std::uint64_t file_bytes_ = 0;  // that the last load read
  std::vector<std::unique_ptr<BatchSlot>> slots_;

  EpochExchange<HostExchange> exchange_;
};

BatchSlotConfig HostEngine::MakeSlotConfig(const Placement& placement, int rank) const {
  BatchSlotConfig config;
  config.intake = MakeIntakeConfig(placement);
  config.intermediate = model().intermediate;
  config.num_local_experts = placement.num_local_experts(rank);
  config.compute_threads = options_.compute_threads;
  return config;
}

absl::StatusOr<MemoryPlan> HostEngine::PlanMemory(const Placement& placement, int rank) const {
  EPS_RETURN_IF_ERROR(CheckPlacement(placement, rank));
  MemoryPlan plan;
  plan.weight_bytes = checkpoint_->HeldExpertBytes(placement.num_local_experts(rank)) +
                      checkpoint_->HeldRouterBytes();
  plan.heap_bytes = HeapBytes(MakeExchangeConfig(placement, rank, /*epoch=*/1));
  plan.workspace_bytes = BatchSlot::PlanBytes(MakeSlotConfig(placement, rank)) *
                         static_cast<std::uint64_t>(options_.num_slots);
  plan.held_type = std::string(DataTypeName(DataType::kFp32));
  return plan;
}

absl::Status HostEngine::LoadExperts(
    const Placement& placement, int rank,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  EPS_RETURN_IF_ERROR(CheckPlacement(placement, rank));
  EPS_RETURN_IF_ERROR(exchange_.CheckClosed("load experts"));
  const std::int64_t first = placement.first_expert[static_cast<std::size_t>(rank)];
  const std::int64_t num = placement.num_local_experts(rank);
  const bool held = HoldsExperts(placement, rank);
  const bool same = HoldsAll(placement, rank);
  SetUnloaded();  // Until all is there again, nothing is.
  if (!held) {
    weights_ = {};  // Gives its memory back before more is taken.
    held_bytes_ = 0;
    EPS_ASSIGN_OR_RETURN(
        weights_, checkpoint_->LoadExpertRange(
                      first, num, [&](std::uint64_t loaded_bytes, std::uint64_t total_bytes) {
                        file_bytes_ = total_bytes;
                        if (progress) progress(loaded_bytes, total_bytes);
                      }));
    held_bytes_ = checkpoint_->HeldExpertBytes(num);
  } else if (progress) {
    progress(file_bytes_, file_bytes_);
  }
  EPS_RETURN_IF_ERROR(LoadRouters());
  if (!same) {
    slots_.clear();
    const BatchSlotConfig config = MakeSlotConfig(placement, rank);
    for (int slot = 0; slot < options_.num_slots; ++slot) {
      slots_.push_back(std::make_unique<BatchSlot>(config));
    }
  }
  SetLoaded(placement, rank);
  return absl::OkStatus();
}

absl::StatusOr<std::string> HostEngine::CreateHeap(std::uint64_t epoch) {
  EPS_RETURN_IF_ERROR(CheckLoaded("create heap"));
  EPS_RETURN_IF_ERROR(exchange_.Begin("create heap"));
  for (const auto& slot : slots_) slot->Release();
  EPS_ASSIGN_OR_RETURN(std::shared_ptr<HostExchange> exchange,
                       HostExchange::Create(MakeExchangeConfig(placement(), rank(), epoch)));
  const std::string handle = exchange->handle();
  exchange_.Open(std::move(exchange));
  return handle;
}

absl::Status HostEngine::OpenPeers(std::span<const std::string> handles) {
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("open peers"));
  return exchange->OpenPeers(handles);
}

void HostEngine::SealHeap() {
  if (const auto exchange = exchange_.Peek()) exchange->Seal();
}

void HostEngine::CloseEpoch() {
  exchange_.Take();
  for (const auto& slot : slots_) slot->Release();
}

absl::StatusOr<std::vector<float>> HostEngine::ReferenceExpert(std::int64_t layer,
                                                               std::int64_t expert,
                                                               std::span<const float> x) const {
  EPS_ASSIGN_OR_RETURN(const std::size_t index, CheckReference(layer, expert, x));
  const auto hidden = static_cast<std::size_t>(model().hidden);
  const auto intermediate = static_cast<std::size_t>(model().intermediate);
  const std::size_t matrix = hidden * intermediate;
  const auto local = static_cast<std::size_t>(expert - weights_.first_expert);
  const float* gate = weights_.layers[index].gate_up.data() + 2 * local * matrix;
  return PlainExpert(gate, gate + matrix, weights_.layers[index].down.data() + local * matrix,
                     hidden, intermediate, x);
}

absl::StatusOr<BatchSlot*> HostEngine::BatchIn(const char* operation, int slot,
                                               BatchSlot::State wanted) {
  EPS_RETURN_IF_ERROR(SlotIn(operation, slot, wanted).status());
  return slots_[static_cast<std::size_t>(slot)].get();
}

absl::Status HostEngine::StageSlot(ShardSlot& slot) {
  static_cast<BatchSlot&>(slot).Reset();
  return absl::OkStatus();
}

absl::StatusOr<CountMatrix> HostEngine::ExchangeCounts(int slot_index) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot,
                       BatchIn("exchange counts", slot_index, BatchSlot::State::kStaged));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("exchange counts"));
  EPS_ASSIGN_OR_RETURN(
      CountMatrix counts,
      exchange->ExchangeCounts(slot_index, slot->intake().input().sequence, slot->counts()));
  slot->SetState(BatchSlot::State::kStaged);
  return counts;
}

absl::Status HostEngine::Dispatch(int slot_index, const CountMatrix& counts) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot,
                       BatchIn("dispatch", slot_index, BatchSlot::State::kStaged));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("dispatch"));
  const auto start = std::chrono::steady_clock::now();
  EPS_RETURN_IF_ERROR(exchange->Dispatch(slot->MakeDispatchArgs(slot_index, counts)));
  slot->times().dispatch_ns = ElapsedNs(start);
  slot->SetState(BatchSlot::State::kDispatched);
  return absl::OkStatus();
}

absl::Status HostEngine::RunExperts(int slot_index) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot,
                       BatchIn("run experts", slot_index, BatchSlot::State::kDispatched));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("run experts"));
  const auto start = std::chrono::steady_clock::now();
  const LayerExperts& experts = weights_.layers[slot->layer_index()];
  LayerWeights layer;
  layer.num_local_experts = weights_.num_experts;
  layer.hidden = model().hidden;
  layer.intermediate = model().intermediate;
  layer.gate_up = experts.gate_up.data();
  layer.down = experts.down.data();
  slot->RunExperts(layer, exchange->Received(slot_index));
  slot->times().ffn_ns = ElapsedNs(start);
  slot->SetState(BatchSlot::State::kComputed);
  return absl::OkStatus();
}

absl::Status HostEngine::Combine(int slot_index) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot,
                       BatchIn("combine", slot_index, BatchSlot::State::kComputed));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("combine"));
  const auto start = std::chrono::steady_clock::now();
  // Where the caller wants it, which Combine allows to be the input's place; or in the place of the
  // rows received, which are used up, and nobody writes new ones before this slot's Finish on every
  // rank. The output is no larger.
  void* output = slot->intake().input().output;
  if (output == nullptr) output = exchange->ReceiveRegion(rank(), slot_index).data();
  EPS_RETURN_IF_ERROR(exchange->Combine(slot_index, output));
  slot->SetOutput(static_cast<const std::byte*>(output));
  slot->times().combine_ns = ElapsedNs(start);
  slot->SetState(BatchSlot::State::kCombined);
  return absl::OkStatus();
}

const std::byte* HostEngine::CombinedRows(int slot_index) const {
  const BatchSlot& slot = *slots_[static_cast<std::size_t>(slot_index)];
  return slot.state() == BatchSlot::State::kCombined ? slot.output() : nullptr;
}

absl::Status HostEngine::Finish(int slot_index, void* output, BatchTimes* times,
                                std::vector<std::int64_t>* local_expert_rows) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot,
                       BatchIn("finish", slot_index, BatchSlot::State::kCombined));
  const std::size_t bytes = slot->intake().row_bytes();
  if (bytes > 0 && output != nullptr && output != slot->output()) {
    std::memcpy(output, slot->output(), bytes);
  }
  if (times != nullptr) *times = slot->times();
  if (local_expert_rows != nullptr) *local_expert_rows = slot->local_expert_rows();
  slot->Release();
  return absl::OkStatus();
}

void HostEngine::Discard(int slot_index) {
  if (slot_index < 0 || static_cast<std::size_t>(slot_index) >= slots_.size()) return;
  slots_[static_cast<std::size_t>(slot_index)]->Release();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> CreateHostEngine(const EngineOptions& options) {
  if (options.compute_threads < 1 || options.compute_threads > 256) {
    return absl::InvalidArgumentError(absl::StrCat(
        "create engine: compute_threads ", options.compute_threads, " is outside [1, 256]"));
  }
  EPS_ASSIGN_OR_RETURN(const int reclaimed, ReclaimStaleHeaps(options.cluster_id));
  if (reclaimed > 0) {
    LogInfo("stale_heaps_reclaimed", {{"cluster_id", options.cluster_id}, {"count", reclaimed}});
  }
  EPS_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint,
                       Checkpoint::Open(options.checkpoint_dir));
  auto engine = std::make_unique<HostEngine>(options, std::move(checkpoint));
  // Every size is checked now, with one rank in place of those to come.
  const Placement whole = EvenPlacement(engine->model().num_experts, 1);
  EPS_RETURN_IF_ERROR(engine->PlanMemory(whole, 0).status());
  return engine;
}

}  // namespace epserve::runtime
