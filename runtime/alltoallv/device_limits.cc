#include "runtime/alltoallv/device_limits.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/base/limits.h"

namespace epserve::runtime {

absl::Status CheckDeviceConfig(const char* name, const ExchangeConfig& config) {
  const auto refuse = [name](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", parts...));
  };
  if (config.num_ranks < 1 || config.num_ranks > kMaxCudaRanks) {
    return refuse("num_ranks ", config.num_ranks, " outside [1, ", kMaxCudaRanks,
                  "]; use fewer workers");
  }
  if (config.rank < 0 || config.rank >= config.num_ranks) {
    return refuse("rank ", config.rank, " outside [0, ", config.num_ranks, ")");
  }
  if (config.max_topk < 1 || config.max_topk > kMaxTopk) {
    return refuse("max_topk ", config.max_topk, " outside [1, ", kMaxTopk, "]");
  }
  if (config.hidden < 4 || config.hidden % 4 != 0) {
    return refuse("hidden ", config.hidden, " is not a positive multiple of 4");
  }
  if (config.placement.num_ranks() != config.num_ranks) {
    return refuse("the placement is for ", config.placement.num_ranks(), " ranks, not ",
                  config.num_ranks);
  }
  if (config.max_batch_tokens < 1 || config.num_slots < 1) {
    return refuse("max_batch_tokens ", config.max_batch_tokens, " and num_slots ", config.num_slots,
                  " must be at least 1");
  }
  return absl::OkStatus();
}

Digest DigestOfDeviceConfig(const ExchangeConfig& config) {
  Digest digest;
  for (const std::int64_t first : config.placement.first_expert) digest.Add(first);
  return digest.Add(config.num_slots)
      .Add(config.max_topk)
      .Add(config.hidden)
      .Add(config.max_batch_tokens);
}

absl::Status CheckRowBytes(const char* operation, std::int64_t hidden, DataType dtype) {
  const std::int64_t bytes = hidden * static_cast<std::int64_t>(DataTypeBytes(dtype));
  if (hidden > 0 && bytes % 16 == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(operation, ": a row of ", bytes, " bytes is not a positive multiple of 16"));
}

absl::Status CheckDeviceTokens(const CudaTokens& tokens, const DeviceTokenLimits& limits) {
  if (tokens.num_tokens < 0 || tokens.num_tokens > limits.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("dispatch: num_tokens ", tokens.num_tokens,
                                                   " outside [0, ", limits.max_tokens,
                                                   "]; raise --max-batch-tokens on every worker"));
  }
  if (tokens.topk < 1 || tokens.topk > limits.max_topk) {
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: topk ", tokens.topk, " outside [1, ", limits.max_topk, "]"));
  }
  if (static_cast<int>(DataTypeBytes(tokens.dtype)) > limits.max_element_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: dtype ", std::string(DataTypeName(tokens.dtype)),
                     " is wider than max_element_bytes ", limits.max_element_bytes));
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
