// What a shard must be before the engine sees it.
#include <limits>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/common/region_io.h"
#include "server/worker/batch_executor.h"

namespace epserve::worker {
namespace {

// The widest routing that any supported layout has; bounds the sizes computed from a shard.
constexpr int kMaxTopk = 16;

absl::Status CheckBytes(std::string_view name, std::size_t got, std::int64_t expected) {
  if (got == static_cast<std::size_t>(expected)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("shard: ", std::string(name), " has ", got, " bytes, expected ", expected));
}

}  // namespace

absl::Status BatchExecutor::CheckShard(const Shard& shard) const {
  const std::int64_t max_tokens =
      runtime::MaxShardTokens(config_.max_batch_tokens, placement_.num_ranks());
  if (shard.num_tokens < 0 || shard.num_tokens > max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: num_tokens ", shard.num_tokens, " is not in [0, ", max_tokens,
                     "]; give coordinator and workers the same --max-batch-tokens"));
  }
  if (shard.topk < 1 || shard.topk > kMaxTopk) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: topk ", shard.topk, " is not in [1, ", kMaxTopk, "]"));
  }
  if (shard.device_counts && shard.counts.has_value()) {
    return absl::InvalidArgumentError(
        "shard: a count matrix came, and the ranks are to exchange the counts, too");
  }
  if (shard.in_arena) EPS_RETURN_IF_ERROR(CheckInArena(shard));
  EPS_RETURN_IF_ERROR(CheckRegions(shard));
  const std::int64_t in_message = shard.in_arena ? 0 : shard.num_tokens;
  EPS_RETURN_IF_ERROR(CheckBytes("hidden", shard.hidden.size(), in_message * RowBytes(shard)));
  const std::int64_t index_bytes = shard.routed ? in_message * shard.topk * 4 : 0;
  EPS_RETURN_IF_ERROR(CheckBytes("topk_ids", shard.topk_ids.size(), index_bytes));
  return CheckBytes("topk_weights", shard.topk_weights.size(), index_bytes);
}

absl::Status BatchExecutor::CheckInArena(const Shard& shard) const {
  if (row_arena_ == nullptr) {
    return absl::InternalError("shard: its rows are in an arena, but this worker has none mapped");
  }
  if (shard.first_row < 0 || shard.first_row > config_.max_batch_tokens - shard.num_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("shard: first_row ", shard.first_row, " with ",
                                                   shard.num_tokens, " rows passes the arena's ",
                                                   config_.max_batch_tokens, " rows"));
  }
  if (shard.topk != engine_->model().topk) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: topk ", shard.topk, " is not the arena's ", engine_->model().topk));
  }
  return absl::OkStatus();
}

absl::Status BatchExecutor::CheckRegions(const Shard& shard) const {
  if (shard.sources.empty() && shard.targets.empty()) return absl::OkStatus();
  if (!shard.in_arena || regions_ == nullptr) {
    return absl::InternalError(
        "shard: its rows are in clients' regions, but this worker cannot reach any");
  }
  constexpr auto kFileEnd = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  const auto row_bytes = static_cast<std::uint64_t>(RowBytes(shard));
  for (const auto* list : {&shard.sources, &shard.targets}) {
    for (const RegionRows& rows : *list) {
      const bool inside = rows.num_rows >= 0 && rows.num_rows <= shard.num_tokens &&
                          rows.first_row >= 0 && rows.first_row <= shard.num_tokens - rows.num_rows;
      if (!inside ||
          !server::Fits(rows.object_offset, static_cast<std::uint64_t>(rows.num_rows) * row_bytes,
                        kFileEnd)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "shard: ", rows.num_rows, " rows from row ", rows.first_row, " at offset ",
            rows.object_offset, " of region ", rows.label, " do not fit its ", shard.num_tokens));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace epserve::worker
