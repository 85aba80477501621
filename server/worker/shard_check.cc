#include "server/worker/shard_check.h"

#include <algorithm>
#include <limits>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"
#include "server/common/region_io.h"
#include "server/common/small_batch.h"

namespace epserve::worker {
namespace {

absl::Status CheckBytes(std::string_view name, std::size_t got, std::int64_t expected) {
  if (got == static_cast<std::size_t>(expected)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("shard: ", std::string(name), " has ", got, " bytes, expected ", expected));
}

template <typename Rows>
bool AreRowsInside(const Rows& rows, std::int64_t num_tokens) {
  return rows.num_rows >= 0 && rows.num_rows <= num_tokens && rows.first_row >= 0 &&
         rows.first_row <= num_tokens - rows.num_rows;
}

absl::Status CheckInArena(const Shard& shard, const ShardLimits& limits) {
  if (limits.arena == nullptr) {
    return absl::InternalError("shard: its rows are in an arena, but this worker has none mapped");
  }
  if (shard.first_row < 0 || shard.first_row > limits.max_batch_tokens - shard.num_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("shard: first_row ", shard.first_row, " with ",
                                                   shard.num_tokens, " rows passes the arena's ",
                                                   limits.max_batch_tokens, " rows"));
  }
  if (shard.topk != limits.model->topk) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: topk ", shard.topk, " is not the arena's ", limits.model->topk));
  }
  std::int64_t end = shard.first_row + shard.num_tokens;
  if (!shard.shard_begin.empty()) end = std::max(end, shard.shard_begin.back());
  end = std::min(end, limits.max_batch_tokens);  // The engine refuses shared batches beyond it.
  const auto bytes = static_cast<std::uint64_t>(end * RowBytes(shard, *limits.model));
  if (!limits.arena->Holds(shard.row_block, bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("shard: its batch's ", bytes,
                                                   " bytes from row_block ", shard.row_block,
                                                   " on pass the arena's blocks"));
  }
  return absl::OkStatus();
}

// The shards' borders themselves are the engine's to check, with those of its peers.
absl::Status CheckSharedBatch(const Shard& shard, const ShardLimits& limits) {
  if (shard.shard_begin.empty()) return absl::OkStatus();
  if (!limits.takes_shared_batches) {
    return absl::InternalError(
        "shard: its batch is shared, but this worker has not said that it takes such");
  }
  const bool rows_missing = !shard.sources.empty() && !shard.rows_follow;
  if (!shard.in_arena || !shard.routed || rows_missing || !shard.device_rows.empty()) {
    return absl::InternalError(
        "shard: its batch is shared, but not all of its rows and ids are in the arena");
  }
  const auto rank = static_cast<std::size_t>(limits.rank);
  if (rank >= shard.shard_begin.size() || shard.shard_begin[rank] != shard.first_row) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: first_row ", shard.first_row,
                     " is not where the shared batch has the shard of ", "rank ", limits.rank));
  }
  return absl::OkStatus();
}

absl::Status CheckRegions(const Shard& shard, const ShardLimits& limits) {
  if (shard.sources.empty() && shard.targets.empty()) return absl::OkStatus();
  if (!shard.in_arena || !limits.has_regions) {
    return absl::InternalError(
        "shard: its rows are in clients' regions, but this worker cannot reach any");
  }
  constexpr auto kFileEnd = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  const auto row_bytes = static_cast<std::uint64_t>(RowBytes(shard, *limits.model));
  for (const auto* list : {&shard.sources, &shard.targets}) {
    for (const RegionRows& rows : *list) {
      if (!AreRowsInside(rows, shard.num_tokens) ||
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

// In order and apart, so that rows can be counted by adding.
absl::Status CheckDeviceRows(const Shard& shard) {
  std::int64_t next_row = 0;
  for (const DeviceRows& rows : shard.device_rows) {
    if (!AreRowsInside(rows, shard.num_tokens) || rows.first_row < next_row) {
      return absl::InvalidArgumentError(
          absl::StrCat("shard: ", rows.num_rows, " device rows from row ", rows.first_row,
                       " do not fit its ", shard.num_tokens, " behind row ", next_row));
    }
    next_row = rows.first_row + rows.num_rows;
  }
  return absl::OkStatus();
}

}  // namespace

std::int64_t RowBytes(const Shard& shard, const runtime::ModelInfo& model) {
  return static_cast<std::int64_t>(runtime::DataTypeBytes(shard.dtype)) * model.hidden;
}

absl::Status CheckShard(const Shard& shard, const ShardLimits& limits) {
  if (shard.num_tokens < 0 || shard.num_tokens > limits.max_shard_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "shard: num_tokens ", shard.num_tokens, " is not in [0, ", limits.max_shard_tokens,
        "]; give coordinator and workers the same --max-batch-tokens"));
  }
  if (shard.topk < 1 || shard.topk > runtime::kMaxTopk) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard: topk ", shard.topk, " is not in [1, ", runtime::kMaxTopk, "]"));
  }
  if (shard.device_counts && shard.counts.has_value()) {
    return absl::InvalidArgumentError(
        "shard: a count matrix came, and the ranks are to exchange the counts, too");
  }
  if (shard.in_arena) EPS_RETURN_IF_ERROR(CheckInArena(shard, limits));
  EPS_RETURN_IF_ERROR(CheckSharedBatch(shard, limits));
  EPS_RETURN_IF_ERROR(CheckRegions(shard, limits));
  EPS_RETURN_IF_ERROR(CheckDeviceRows(shard));
  const std::int64_t in_message = shard.in_arena ? 0 : shard.num_tokens;
  const bool on_device = NumRowsWith(&DeviceRows::hidden, shard.device_rows) == shard.num_tokens;
  EPS_RETURN_IF_ERROR(CheckBytes("hidden", shard.hidden.size(),
                                 on_device ? 0 : in_message * RowBytes(shard, *limits.model)));
  const std::int64_t index_bytes = shard.routed ? in_message * shard.topk * 4 : 0;
  EPS_RETURN_IF_ERROR(CheckBytes("topk_ids", shard.topk_ids.size(), index_bytes));
  return CheckBytes("topk_weights", shard.topk_weights.size(), index_bytes);
}

bool IsSmall(const Shard& shard, int num_ranks) {
  if (!shard.counts) return shard.num_tokens * num_ranks <= server::kSmallBatchRows;
  for (int rank = 0; rank < shard.counts->num_ranks; ++rank) {
    if (shard.counts->NumReceived(rank) > server::kSmallBatchRows) return false;
  }
  return shard.num_tokens <= server::kSmallBatchRows;
}

absl::Status CheckCounts(const Shard& shard, const runtime::ShardCounts& staged,
                         const runtime::Placement& placement, int rank,
                         std::int64_t max_batch_tokens) {
  EPS_RETURN_IF_ERROR(runtime::ValidateCountMatrix(*shard.counts, placement, max_batch_tokens));
  for (int dst = 0; dst < placement.num_ranks(); ++dst) {
    if (shard.counts->at(rank, dst) != staged.rows_to_rank[dst]) {
      return absl::InternalError(absl::StrCat(
          "count matrix: ", shard.counts->at(rank, dst), " rows from rank ", rank, " to rank ", dst,
          ", but the shard of batch ", shard.batch, " has ", staged.rows_to_rank[dst]));
    }
  }
  return absl::OkStatus();
}

}  // namespace epserve::worker
