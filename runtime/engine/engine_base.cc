#include "runtime/engine/engine_base.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "runtime/alltoallv/host_exchange.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

template <typename... Parts>
absl::Status RefuseEngine(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace

EngineBase::EngineBase(const EngineOptions& options, std::unique_ptr<Checkpoint> checkpoint)
    : options_(options), checkpoint_(std::move(checkpoint)) {}

absl::Status EngineBase::CheckPlacement(const Placement& placement, int rank) const {
  const auto& first = placement.first_expert;
  if (first.size() < 2 || first.front() != 0 || !std::is_sorted(first.begin(), first.end())) {
    return RefuseEngine("load experts: placement is not ascending from 0 for at least one rank");
  }
  if (placement.num_experts() != model().num_experts) {
    return RefuseEngine("load experts: placement is for ", placement.num_experts(),
                        " experts; the model has ", model().num_experts);
  }
  if (rank < 0 || rank >= placement.num_ranks()) {
    return RefuseEngine("load experts: rank ", rank, " is outside [0, ", placement.num_ranks(),
                        ")");
  }
  return ValidateExchangeConfig(MakeExchangeConfig(placement, rank, /*epoch=*/1));
}

ExchangeConfig EngineBase::MakeExchangeConfig(const Placement& placement, int rank,
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
  config.busy_poll = options_.busy_poll;
  return config;
}

ShardIntake::Config EngineBase::MakeIntakeConfig(const Placement& placement) const {
  return {.hidden = model().hidden,
          .num_experts = model().num_experts,
          .max_batch_tokens = options_.max_batch_tokens,
          .max_shard_tokens = MaxShardTokens(options_.max_batch_tokens, placement.num_ranks()),
          .router = checkpoint_->config().router,
          .has_router = model().has_router};
}

void EngineBase::SetLoaded(const Placement& placement, int rank) {
  placement_ = placement;
  rank_ = rank;
}

bool EngineBase::HoldsExperts(const Placement& placement, int rank) const {
  if (!loaded()) return false;
  const auto wanted = static_cast<std::size_t>(rank);
  const auto held = static_cast<std::size_t>(rank_);
  return placement.first_expert[wanted] == placement_.first_expert[held] &&
         placement.first_expert[wanted + 1] == placement_.first_expert[held + 1];
}

bool EngineBase::HoldsAll(const Placement& placement, int rank) const {
  return loaded() && rank_ == rank && placement_.first_expert == placement.first_expert;
}

absl::Status EngineBase::LoadRouters() {
  if (!model().has_router || !routers_.empty()) return absl::OkStatus();
  std::vector<RouterWeights> routers;
  for (std::size_t layer = 0; layer < model().layers.size(); ++layer) {
    EPS_ASSIGN_OR_RETURN(RouterWeights router, checkpoint_->LoadRouter(layer));
    routers.push_back(std::move(router));
  }
  routers_ = std::move(routers);
  return absl::OkStatus();
}

absl::Status EngineBase::CheckLoaded(const char* operation) const {
  if (loaded()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(operation, ": no experts are loaded; load them first"));
}

absl::StatusOr<std::size_t> EngineBase::LayerIndex(const char* operation,
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

absl::StatusOr<std::size_t> EngineBase::CheckReference(std::int64_t layer, std::int64_t expert,
                                                       std::span<const float> x) const {
  EPS_ASSIGN_OR_RETURN(const std::size_t index, LayerIndex("reference expert", layer));
  if (!loaded() || expert < placement_.first_expert[static_cast<std::size_t>(rank_)] ||
      expert >= placement_.first_expert[static_cast<std::size_t>(rank_) + 1]) {
    return absl::FailedPreconditionError(
        absl::StrCat("reference expert: expert ", expert, " is not loaded on this rank"));
  }
  if (x.size() != static_cast<std::size_t>(model().hidden)) {
    return RefuseEngine("reference expert: x has ", x.size(),
                        " values; the model's hidden size is ", model().hidden);
  }
  return index;
}

absl::StatusOr<ShardSlot*> EngineBase::SlotIn(const char* operation, int slot,
                                              ShardSlot::State wanted) {
  EPS_RETURN_IF_ERROR(CheckLoaded(operation));
  if (slot < 0 || slot >= options_.num_slots) {
    return RefuseEngine(operation, ": slot ", slot, " is outside [0, ", options_.num_slots, ")");
  }
  ShardSlot& found = SlotAt(slot);
  if (found.state() != wanted) {
    return absl::FailedPreconditionError(absl::StrCat(operation, ": slot ", slot, " is ",
                                                      ShardSlot::StateName(found.state()), ", not ",
                                                      ShardSlot::StateName(wanted)));
  }
  return &found;
}

absl::Status EngineBase::CheckDeviceRouting(const ShardInput& input) const {
  if (NumRoutedIn(input.device_rows) == 0) return absl::OkStatus();
  if (!dispatches_uncounted(input.topk)) {
    return RefuseEngine("stage: the ids are in device memory, and the ", std::string(backend()),
                        " backend cannot dispatch topk ", input.topk, " uncounted; read them");
  }
  if (input.device_rows.size() <= kMaxRoutedPieces) return absl::OkStatus();
  return RefuseEngine("stage: the ids are in ", input.device_rows.size(),
                      " pieces of device memory, more than ", kMaxRoutedPieces, "; read them");
}

absl::StatusOr<ShardCounts> EngineBase::Stage(const ShardInput& input) {
  EPS_ASSIGN_OR_RETURN(ShardSlot * slot, SlotIn("stage", input.slot, ShardSlot::State::kFree));
  EPS_ASSIGN_OR_RETURN(const std::size_t layer, LayerIndex("stage", input.layer));
  EPS_RETURN_IF_ERROR(CheckDeviceRouting(input));
  const RouterWeights* router = routers_.empty() ? nullptr : &routers_[layer];
  EPS_RETURN_IF_ERROR(slot->TakeIn(input, layer, router));
  slot->SetState(ShardSlot::State::kFailed);
  EPS_RETURN_IF_ERROR(StageSlot(*slot));
  slot->SetState(ShardSlot::State::kStaged);
  ShardCounts counts;
  if (slot->intake().routed_on_device()) {
    slot->SetCounts(counts);
    return counts;
  }
  counts.rows_to_rank.resize(static_cast<std::size_t>(placement_.num_ranks()));
  counts.rows_per_expert.resize(static_cast<std::size_t>(model().num_experts));
  CountShard(slot->intake().ids(), input.topk, placement_, counts.rows_to_rank,
             counts.rows_per_expert);
  slot->SetCounts(counts);
  return counts;
}

std::vector<float> PlainExpert(const float* gate, const float* up, const float* down,
                               std::size_t hidden, std::size_t intermediate,
                               std::span<const float> x) {
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

}  // namespace epserve::runtime
