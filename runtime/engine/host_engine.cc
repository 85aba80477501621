// The engine of the host backend: HostExchange for dispatch and combine, ExpertFfn for the experts,
// the router where a shard comes without ids. See engine.h for life cycle and thread safety.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
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
#include "runtime/experts/expert_ffn.h"
#include "runtime/symmetric/stale_heaps.h"

namespace epserve::runtime {
namespace {

template <typename... Parts>
absl::Status Refuse(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

std::int64_t ElapsedNs(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() -
                                                              since)
      .count();
}

class HostEngine final : public Engine {
 public:
  HostEngine(const EngineOptions& options, std::unique_ptr<Checkpoint> checkpoint)
      : options_(options), checkpoint_(std::move(checkpoint)) {}

  std::string_view backend() const override { return "host"; }
  const ModelInfo& model() const override { return checkpoint_->info(); }

  absl::StatusOr<MemoryPlan> PlanMemory(const Placement& placement, int rank) const override;
  absl::Status LoadExperts(
      const Placement& placement, int rank,
      const std::function<void(std::uint64_t, std::uint64_t)>& progress) override;

  absl::StatusOr<std::string> CreateHeap(std::uint64_t epoch) override;
  absl::Status OpenPeers(std::span<const std::string> handles) override;
  void SealHeap() override;
  void Abort() override;
  void CloseEpoch() override;

  absl::StatusOr<std::vector<float>> ReferenceExpert(std::int64_t layer, std::int64_t expert,
                                                     std::span<const float> x) const override;

  absl::StatusOr<ShardCounts> Stage(const ShardInput& input) override;
  absl::Status Dispatch(int slot, const CountMatrix& counts) override;
  absl::Status RunExperts(int slot) override;
  absl::Status Combine(int slot) override;
  absl::Status Finish(int slot, void* output, BatchTimes* times,
                      std::vector<std::int64_t>* local_expert_rows) override;
  void Discard(int slot) override;

 private:
  absl::Status ValidatePlacement(const Placement& placement, int rank) const;
  ExchangeConfig MakeExchangeConfig(const Placement& placement, int rank,
                                    std::uint64_t epoch) const;
  BatchSlotConfig MakeSlotConfig(const Placement& placement, int rank) const;
  // The slot in `wanted`; FAILED_PRECONDITION otherwise. `operation` opens the message.
  absl::StatusOr<BatchSlot*> SlotIn(const char* operation, int slot, BatchSlot::State wanted);
  absl::StatusOr<std::shared_ptr<HostExchange>> OpenExchange(const char* operation) const;
  absl::StatusOr<std::size_t> LayerIndex(const char* operation, std::int64_t layer) const;
  bool loaded() const { return rank_ >= 0; }

  const EngineOptions options_;
  const std::unique_ptr<Checkpoint> checkpoint_;

  // Set by LoadExperts, read by batches.
  int rank_ = -1;  // -1: nothing is loaded
  Placement placement_;
  ExpertWeights weights_;
  std::vector<RouterWeights> routers_;  // by layer index
  std::uint64_t file_bytes_ = 0;        // that the last load read
  std::vector<std::unique_ptr<BatchSlot>> slots_;

  mutable std::mutex exchange_mutex_;  // Abort() comes from any thread.
  std::shared_ptr<HostExchange> exchange_;
  bool aborted_ = false;
};

absl::Status HostEngine::ValidatePlacement(const Placement& placement, int rank) const {
  const auto& first = placement.first_expert;
  if (first.size() < 2 || first.front() != 0 || !std::is_sorted(first.begin(), first.end())) {
    return Refuse("load experts: placement is not ascending from 0 for at least one rank");
  }
  if (placement.num_experts() != model().num_experts) {
    return Refuse("load experts: placement is for ", placement.num_experts(),
                  " experts; the model has ", model().num_experts);
  }
  if (rank < 0 || rank >= placement.num_ranks()) {
    return Refuse("load experts: rank ", rank, " is outside [0, ", placement.num_ranks(), ")");
  }
  return ValidateExchangeConfig(MakeExchangeConfig(placement, rank, /*epoch=*/1));
}

ExchangeConfig HostEngine::MakeExchangeConfig(const Placement& placement, int rank,
                                              std::uint64_t epoch) const {
  ExchangeConfig config;
  config.cluster_id = options_.cluster_id;
  config.epoch = epoch;
  config.rank = rank;
  config.num_ranks = placement.num_ranks();
  config.max_batch_tokens = options_.max_batch_tokens;
  config.hidden = model().hidden;
  config.max_topk = kMaxTopk;
  config.num_slots = options_.num_slots;
  config.placement = placement;
  config.peer_timeout = options_.peer_timeout;
  return config;
}

BatchSlotConfig HostEngine::MakeSlotConfig(const Placement& placement, int rank) const {
  BatchSlotConfig config;
  config.intake = {
      .hidden = model().hidden,
      .num_experts = model().num_experts,
      .max_batch_tokens = options_.max_batch_tokens,
      .max_shard_tokens = MaxShardTokens(options_.max_batch_tokens, placement.num_ranks()),
      .router = checkpoint_->config().router,
      .has_router = model().has_router};
  config.intermediate = model().intermediate;
  config.num_local_experts = placement.num_local_experts(rank);
  config.compute_threads = options_.compute_threads;
  return config;
}

absl::StatusOr<MemoryPlan> HostEngine::PlanMemory(const Placement& placement, int rank) const {
  EPS_RETURN_IF_ERROR(ValidatePlacement(placement, rank));
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
  EPS_RETURN_IF_ERROR(ValidatePlacement(placement, rank));
  {
    const std::lock_guard lock(exchange_mutex_);
    if (exchange_ != nullptr) {
      return absl::FailedPreconditionError("load experts: an epoch is open; close it first");
    }
  }
  const std::int64_t first = placement.first_expert[static_cast<std::size_t>(rank)];
  const std::int64_t num = placement.num_local_experts(rank);
  const bool held = loaded() && weights_.first_expert == first && weights_.num_experts == num;
  const bool same = held && rank_ == rank && placement_.first_expert == placement.first_expert;
  rank_ = -1;  // Until all is there again, nothing is.
  if (!held) {
    weights_ = {};  // Gives its memory back before more is taken.
    EPS_ASSIGN_OR_RETURN(
        weights_, checkpoint_->LoadExpertRange(
                      first, num, [&](std::uint64_t loaded_bytes, std::uint64_t total_bytes) {
                        file_bytes_ = total_bytes;
                        if (progress) progress(loaded_bytes, total_bytes);
                      }));
  } else if (progress) {
    progress(file_bytes_, file_bytes_);
  }
  if (model().has_router && routers_.empty()) {
    std::vector<RouterWeights> routers;
    for (std::size_t layer = 0; layer < model().layers.size(); ++layer) {
      EPS_ASSIGN_OR_RETURN(RouterWeights router, checkpoint_->LoadRouter(layer));
      routers.push_back(std::move(router));
    }
    routers_ = std::move(routers);
  }
  if (!same) {
    slots_.clear();
    const BatchSlotConfig config = MakeSlotConfig(placement, rank);
    for (int slot = 0; slot < options_.num_slots; ++slot) {
      slots_.push_back(std::make_unique<BatchSlot>(config));
    }
  }
  placement_ = placement;
  rank_ = rank;
  return absl::OkStatus();
}

absl::StatusOr<std::string> HostEngine::CreateHeap(std::uint64_t epoch) {
  if (!loaded()) {
    return absl::FailedPreconditionError("create heap: no experts are loaded; load them first");
  }
  {
    const std::lock_guard lock(exchange_mutex_);
    if (exchange_ != nullptr) {
      return absl::FailedPreconditionError("create heap: an epoch is open; close it first");
    }
    aborted_ = false;
  }
  for (const auto& slot : slots_) slot->Release();
  EPS_ASSIGN_OR_RETURN(std::shared_ptr<HostExchange> exchange,
                       HostExchange::Create(MakeExchangeConfig(placement_, rank_, epoch)));
  const std::lock_guard lock(exchange_mutex_);
  if (aborted_) exchange->Abort();  // Abort() came while the heap was being made.
  exchange_ = std::move(exchange);
  return exchange_->handle();
}

absl::StatusOr<std::shared_ptr<HostExchange>> HostEngine::OpenExchange(
    const char* operation) const {
  const std::lock_guard lock(exchange_mutex_);
  if (aborted_) {
    return absl::AbortedError(absl::StrCat(operation, ": the epoch was aborted"));
  }
  if (exchange_ == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(operation, ": no epoch is open"));
  }
  return exchange_;
}

absl::Status HostEngine::OpenPeers(std::span<const std::string> handles) {
  EPS_ASSIGN_OR_RETURN(const std::shared_ptr<HostExchange> exchange, OpenExchange("open peers"));
  return exchange->OpenPeers(handles);
}

void HostEngine::SealHeap() {
  const std::lock_guard lock(exchange_mutex_);
  if (exchange_ != nullptr) exchange_->Seal();
}

void HostEngine::Abort() {
  const std::lock_guard lock(exchange_mutex_);
  aborted_ = true;
  if (exchange_ != nullptr) exchange_->Abort();
}

void HostEngine::CloseEpoch() {
  std::shared_ptr<HostExchange> exchange;
  {
    const std::lock_guard lock(exchange_mutex_);
    exchange = std::move(exchange_);
    exchange_ = nullptr;
  }
  for (const auto& slot : slots_) slot->Release();
}

absl::StatusOr<std::size_t> HostEngine::LayerIndex(const char* operation,
                                                   std::int64_t layer) const {
  const auto& layers = model().layers;
  const auto found = std::lower_bound(layers.begin(), layers.end(), layer);
  if (found == layers.end() || *found != layer) {
    return absl::NotFoundError(absl::StrCat(operation, ": layer ", layer,
                                            " has no experts; the first that has is ",
                                            layers.front(), ", the last ", layers.back()));
  }
  return static_cast<std::size_t>(found - layers.begin());
}

absl::StatusOr<std::vector<float>> HostEngine::ReferenceExpert(std::int64_t layer,
                                                               std::int64_t expert,
                                                               std::span<const float> x) const {
  EPS_ASSIGN_OR_RETURN(const std::size_t index, LayerIndex("reference expert", layer));
  const std::int64_t local = expert - weights_.first_expert;
  if (!loaded() || local < 0 || local >= weights_.num_experts) {
    return absl::FailedPreconditionError(
        absl::StrCat("reference expert: expert ", expert, " is not loaded on this rank"));
  }
  const auto hidden = static_cast<std::size_t>(model().hidden);
  const auto intermediate = static_cast<std::size_t>(model().intermediate);
  if (x.size() != hidden) {
    return Refuse("reference expert: x has ", x.size(), " values; the model's hidden size is ",
                  hidden);
  }
  const std::size_t matrix = hidden * intermediate;
  const float* gate =
      weights_.layers[index].gate_up.data() + 2 * static_cast<std::size_t>(local) * matrix;
  const float* up = gate + matrix;
  const float* down = weights_.layers[index].down.data() + static_cast<std::size_t>(local) * matrix;
  std::vector<double> middle(intermediate);
  for (std::size_t i = 0; i < intermediate; ++i) {
    double gate_sum = 0.0;
    double up_sum = 0.0;
    for (std::size_t h = 0; h < hidden; ++h) {
      gate_sum += static_cast<double>(gate[i * hidden + h]) * x[h];
      up_sum += static_cast<double>(up[i * hidden + h]) * x[h];
    }
    middle[i] = gate_sum / (1.0 + std::exp(-gate_sum)) * up_sum;
  }
  std::vector<float> result(hidden);
  for (std::size_t h = 0; h < hidden; ++h) {
    double sum = 0.0;
    for (std::size_t i = 0; i < intermediate; ++i) sum += down[h * intermediate + i] * middle[i];
    result[h] = static_cast<float>(sum);
  }
  return result;
}

absl::StatusOr<BatchSlot*> HostEngine::SlotIn(const char* operation, int slot,
                                              BatchSlot::State wanted) {
  if (!loaded()) {
    return absl::FailedPreconditionError(absl::StrCat(operation, ": no experts are loaded"));
  }
  if (slot < 0 || slot >= options_.num_slots) {
    return Refuse(operation, ": slot ", slot, " is outside [0, ", options_.num_slots, ")");
  }
  BatchSlot* const found = slots_[static_cast<std::size_t>(slot)].get();
  if (found->state() != wanted) {
    return absl::FailedPreconditionError(absl::StrCat(operation, ": slot ", slot, " is ",
                                                      BatchSlot::StateName(found->state()),
                                                      ", not ", BatchSlot::StateName(wanted)));
  }
  return found;
}

absl::StatusOr<ShardCounts> HostEngine::Stage(const ShardInput& input) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot, SlotIn("stage", input.slot, BatchSlot::State::kFree));
  EPS_ASSIGN_OR_RETURN(const std::size_t layer, LayerIndex("stage", input.layer));
  const RouterWeights* router = routers_.empty() ? nullptr : &routers_[layer];
  EPS_RETURN_IF_ERROR(slot->Stage(input, layer, router));
  ShardCounts counts;
  counts.rows_to_rank.resize(static_cast<std::size_t>(placement_.num_ranks()));
  counts.rows_per_expert.resize(static_cast<std::size_t>(model().num_experts));
  CountShard(slot->intake().ids(), input.topk, placement_, counts.rows_to_rank,
             counts.rows_per_expert);
  return counts;
}

absl::Status HostEngine::Dispatch(int slot_index, const CountMatrix& counts) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot, SlotIn("dispatch", slot_index, BatchSlot::State::kStaged));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const std::shared_ptr<HostExchange> exchange, OpenExchange("dispatch"));
  const auto start = std::chrono::steady_clock::now();
  EPS_RETURN_IF_ERROR(exchange->Dispatch(slot->MakeDispatchArgs(slot_index, counts)));
  slot->times().dispatch_ns = ElapsedNs(start);
  slot->SetState(BatchSlot::State::kDispatched);
  return absl::OkStatus();
}

absl::Status HostEngine::RunExperts(int slot_index) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot,
                       SlotIn("run experts", slot_index, BatchSlot::State::kDispatched));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const std::shared_ptr<HostExchange> exchange, OpenExchange("run experts"));
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
                       SlotIn("combine", slot_index, BatchSlot::State::kComputed));
  slot->SetState(BatchSlot::State::kFailed);
  EPS_ASSIGN_OR_RETURN(const std::shared_ptr<HostExchange> exchange, OpenExchange("combine"));
  const auto start = std::chrono::steady_clock::now();
  // The rows received are used up, and nobody writes new ones before this slot's Finish on every
  // rank: their place takes the output, which is no larger.
  const std::span<std::byte> output = exchange->ReceiveRegion(rank_, slot_index);
  EPS_RETURN_IF_ERROR(exchange->Combine(slot_index, output.data()));
  slot->SetOutput(output.data());
  slot->times().combine_ns = ElapsedNs(start);
  slot->SetState(BatchSlot::State::kCombined);
  return absl::OkStatus();
}

absl::Status HostEngine::Finish(int slot_index, void* output, BatchTimes* times,
                                std::vector<std::int64_t>* local_expert_rows) {
  EPS_ASSIGN_OR_RETURN(BatchSlot * slot, SlotIn("finish", slot_index, BatchSlot::State::kCombined));
  const std::size_t bytes = slot->intake().row_bytes();
  if (bytes > 0) std::memcpy(output, slot->output(), bytes);
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
    return Refuse("create engine: compute_threads ", options.compute_threads,
                  " is outside [1, 256]");
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
