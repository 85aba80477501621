#include "runtime/engine/batch_slot.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// Rows that are widened to fp32 together before they are routed.
constexpr std::int64_t kRoutedRows = 16;

template <typename... Parts>
absl::Status Refuse(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("stage: ", parts...));
}

ExpertFfn::Config FfnConfig(const BatchSlotConfig& config) {
  return {.hidden = config.hidden,
          .intermediate = config.intermediate,
          .max_rows = config.max_batch_tokens,
          .max_local_experts = config.num_local_experts,
          .max_topk = kMaxTopk,
          .threads = config.compute_threads};
}

// Bytes of a slot's own buffers, the expert workspace apart.
std::uint64_t BufferBytes(const BatchSlotConfig& config) {
  std::int64_t bytes = config.max_shard_tokens * (kMaxTopk * 8 + config.hidden * 4);
  bytes += config.num_local_experts * 8;
  if (config.has_router) {
    bytes += 4 * (kRoutedRows * config.hidden + RouterScratchFloats(config.router));
  }
  return static_cast<std::uint64_t>(bytes);
}

template <typename T>
std::unique_ptr<T[]> Buffer(std::int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(count));
}

}  // namespace

const char* BatchSlot::StateName(State state) {
  switch (state) {
    case State::kFree:
      return "free";
    case State::kStaged:
      return "staged";
    case State::kDispatched:
      return "dispatched";
    case State::kComputed:
      return "computed";
    case State::kCombined:
      return "combined";
    case State::kFailed:
      return "failed";
  }
  return "unknown";
}

BatchSlot::BatchSlot(const BatchSlotConfig& config)
    : config_(config),
      local_expert_rows_(static_cast<std::size_t>(config.num_local_experts)),
      topk_ids_(Buffer<std::int32_t>(config.max_shard_tokens * kMaxTopk)),
      topk_weights_(Buffer<float>(config.max_shard_tokens * kMaxTopk)),
      output_(Buffer<std::byte>(config.max_shard_tokens * config.hidden * 4)),
      ffn_(ExpertFfn::Create(FfnConfig(config))) {
  if (!config.has_router) return;
  routed_rows_ = Buffer<float>(kRoutedRows * config.hidden);
  router_scratch_ = Buffer<float>(RouterScratchFloats(config.router));
}

std::uint64_t BatchSlot::PlanBytes(const BatchSlotConfig& config) {
  ExpertFfn::Config ffn = FfnConfig(config);
  ffn.threads = 1;  // Asked for its size alone; memory that is not touched is not resident.
  return ExpertFfn::Create(ffn)->workspace_bytes() + BufferBytes(config);
}

absl::Status BatchSlot::Validate(const ShardInput& input, bool has_router) const {
  if (input.dtype != DataType::kFp32 && input.dtype != DataType::kFp16 &&
      input.dtype != DataType::kBf16) {
    return Refuse("dtype ", std::string(DataTypeName(input.dtype)), " is none of fp32, fp16, bf16");
  }
  if (input.num_tokens < 0 || input.num_tokens > config_.max_shard_tokens) {
    return Refuse("num_tokens ", input.num_tokens, " is outside [0, ", config_.max_shard_tokens,
                  "], a rank's share of max_batch_tokens ", config_.max_batch_tokens);
  }
  if (input.topk < 1 || input.topk > kMaxTopk) {
    return Refuse("topk ", input.topk, " is outside [1, ", kMaxTopk, "]");
  }
  if (input.num_tokens > 0 && input.hidden == nullptr) return Refuse("hidden is null");
  if ((input.topk_ids == nullptr) != (input.topk_weights == nullptr) && input.num_tokens > 0) {
    return Refuse("topk_ids and topk_weights must be given together");
  }
  if (input.topk_ids == nullptr && input.num_tokens > 0) {
    if (!has_router) return Refuse("topk_ids are absent, and the checkpoint has no router");
    if (input.topk != config_.router.topk) {
      return Refuse("topk ", input.topk, " is not the router's ", config_.router.topk);
    }
    return absl::OkStatus();
  }
  for (std::int64_t i = 0; i < input.num_tokens * input.topk; ++i) {
    if (input.topk_ids[i] < -1 || input.topk_ids[i] >= config_.num_experts) {
      return Refuse("topk_ids[", i / input.topk, "][", i % input.topk, "] ", input.topk_ids[i],
                    " is outside [-1, ", config_.num_experts, ")");
    }
  }
  return absl::OkStatus();
}

absl::Status BatchSlot::Stage(const ShardInput& input, std::size_t layer_index,
                              const RouterWeights* router) {
  EPS_RETURN_IF_ERROR(Validate(input, router != nullptr));
  if (input.topk_ids == nullptr) {
    if (input.num_tokens > 0) Route(input, *router);
  } else {
    const std::int64_t count = input.num_tokens * input.topk;
    std::copy_n(input.topk_ids, count, topk_ids_.get());
    if (count > 0) std::copy_n(input.topk_weights, count, topk_weights_.get());
  }
  input_ = input;
  layer_index_ = layer_index;
  times_ = {};
  std::fill(local_expert_rows_.begin(), local_expert_rows_.end(), 0);
  state_ = State::kStaged;
  return absl::OkStatus();
}

void BatchSlot::Route(const ShardInput& input, const RouterWeights& router) {
  const std::size_t row_bytes =
      static_cast<std::size_t>(config_.hidden) * DataTypeBytes(input.dtype);
  const std::span<float> scratch(router_scratch_.get(),
                                 static_cast<std::size_t>(RouterScratchFloats(config_.router)));
  for (std::int64_t row = 0; row < input.num_tokens; row += kRoutedRows) {
    const std::int64_t count = std::min(kRoutedRows, input.num_tokens - row);
    ConvertToFloat(
        input.dtype,
        static_cast<const std::byte*>(input.hidden) + static_cast<std::size_t>(row) * row_bytes,
        routed_rows_.get(), static_cast<std::size_t>(count * config_.hidden));
    RouteRows(config_.router, router.gate.data(), router.bias.data(), routed_rows_.get(), count,
              scratch, topk_ids_.get() + row * input.topk, topk_weights_.get() + row * input.topk);
  }
}

DispatchArgs BatchSlot::MakeDispatchArgs(int slot, const CountMatrix& counts) {
  counts_ = counts;
  DispatchArgs args;
  args.slot = slot;
  args.sequence = input_.sequence;
  args.dtype = input_.dtype;
  args.x = input_.hidden;
  args.topk_ids = topk_ids_.get();
  args.topk_weights = topk_weights_.get();
  args.num_tokens = input_.num_tokens;
  args.topk = input_.topk;
  args.counts = &counts_;
  return args;
}

void BatchSlot::RunExperts(const LayerWeights& layer, const ReceivedRows& received) {
  ffn_->Run(layer, received, local_expert_rows_);
}

std::span<const std::int32_t> BatchSlot::topk_ids() const {
  return {topk_ids_.get(), static_cast<std::size_t>(input_.num_tokens * input_.topk)};
}

std::size_t BatchSlot::output_bytes() const {
  return static_cast<std::size_t>(input_.num_tokens * config_.hidden) * DataTypeBytes(input_.dtype);
}

}  // namespace epserve::runtime
