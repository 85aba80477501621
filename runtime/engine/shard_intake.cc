#include "runtime/engine/shard_intake.h"

#include <algorithm>
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

template <typename T>
std::unique_ptr<T[]> Buffer(std::int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(count));
}

}  // namespace

ShardIntake::ShardIntake(const Config& config)
    : config_(config),
      topk_ids_(Buffer<std::int32_t>(config.max_shard_tokens * kMaxTopk)),
      topk_weights_(Buffer<float>(config.max_shard_tokens * kMaxTopk)) {
  if (!config.has_router) return;
  routed_rows_ = Buffer<float>(kRoutedRows * config.hidden);
  router_scratch_ = Buffer<float>(RouterScratchFloats(config.router));
}

std::uint64_t ShardIntake::PlanBytes(const Config& config) {
  std::int64_t bytes = config.max_shard_tokens * kMaxTopk * 8;
  if (config.has_router) {
    bytes += 4 * (kRoutedRows * config.hidden + RouterScratchFloats(config.router));
  }
  return static_cast<std::uint64_t>(bytes);
}

absl::Status ShardIntake::Validate(const ShardInput& input, bool has_router) const {
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
  if (input.hidden == nullptr && NumHiddenIn(input.device_rows) < input.num_tokens) {
    return Refuse("hidden is null");
  }
  if ((input.topk_ids == nullptr) != (input.topk_weights == nullptr) && input.num_tokens > 0) {
    return Refuse("topk_ids and topk_weights must be given together");
  }
  if (const std::int64_t routed = NumRoutedIn(input.device_rows); routed > 0) {
    if (input.topk_ids == nullptr && routed == input.num_tokens) return absl::OkStatus();
    return Refuse("the ids of ", routed, " of ", input.num_tokens,
                  " rows are in device memory, which must be those of all or of none");
  }
  if (input.topk_ids == nullptr && input.num_tokens > 0) {
    if (NumHiddenIn(input.device_rows) > 0) {
      return Refuse("topk_ids are absent, and rows in device memory are not routed");
    }
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

absl::Status ShardIntake::Take(const ShardInput& input, const RouterWeights* router) {
  EPS_RETURN_IF_ERROR(Validate(input, router != nullptr));
  if (input.topk_ids == nullptr) {
    if (input.num_tokens > 0 && NumRoutedIn(input.device_rows) == 0) Route(input, *router);
  } else {
    const std::int64_t count = input.num_tokens * input.topk;
    std::copy_n(input.topk_ids, count, topk_ids_.get());
    if (count > 0) std::copy_n(input.topk_weights, count, topk_weights_.get());
  }
  input_ = input;
  return absl::OkStatus();
}

void ShardIntake::Route(const ShardInput& input, const RouterWeights& router) {
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

}  // namespace epserve::runtime
