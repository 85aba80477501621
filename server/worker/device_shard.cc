#include "server/worker/device_shard.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::worker {
namespace {

bool HasRouting(const DeviceRows& part) {
  return part.topk_ids.has_value() || part.topk_weights.has_value();
}

// As the front door names an entry.
std::string Entry(const char* tensor, const DeviceRows& part, std::int64_t index, int topk) {
  return absl::StrCat("infer: ", tensor, "[", part.request_row + index / topk, ",", index % topk,
                      "]");
}

absl::Status RefuseId(const DeviceRows& part, std::int64_t index, int topk, std::int64_t id,
                      std::int64_t num_experts) {
  return absl::InvalidArgumentError(absl::StrCat(Entry("topk_ids", part, index, topk), " is ", id,
                                                 ", outside [-1, ", num_experts, ")"));
}

absl::Status RefuseWeight(const DeviceRows& part, std::int64_t index, int topk, float weight) {
  return absl::InvalidArgumentError(absl::StrCat(Entry("topk_weights", part, index, topk), " is ",
                                                 weight, ", not a finite number"));
}

}  // namespace

absl::StatusOr<std::byte*> DeviceShard::Find(const std::optional<server::DevicePlace>& place,
                                             std::int64_t bytes, const OpenDeviceRegions& regions) {
  if (!place.has_value()) return nullptr;
  EPS_ASSIGN_OR_RETURN(OpenDeviceRegions::Located located,
                       regions.Locate(*place, static_cast<std::uint64_t>(bytes)));
  held_.push_back(std::move(located.region));
  return located.data;
}

absl::Status DeviceShard::Locate(const Shard& shard, std::int64_t row_bytes,
                                 const OpenDeviceRegions* regions) {
  Release();
  if (shard.device_rows.empty()) return absl::OkStatus();
  if (regions == nullptr) {
    return absl::InternalError("shard: its rows are in device regions, but none are open here");
  }
  for (const DeviceRows& part : shard.device_rows) {
    runtime::ShardDeviceRows rows{.first_row = part.first_row, .num_rows = part.num_rows};
    Routing routing;
    EPS_ASSIGN_OR_RETURN(rows.hidden, Find(part.hidden, part.num_rows * row_bytes, *regions));
    EPS_ASSIGN_OR_RETURN(rows.output, Find(part.output, part.num_rows * row_bytes, *regions));
    const std::int64_t entries = part.num_rows * shard.topk;
    EPS_ASSIGN_OR_RETURN(routing.ids,
                         Find(part.topk_ids, entries * (part.wide_ids ? 8 : 4), *regions));
    EPS_ASSIGN_OR_RETURN(routing.weights, Find(part.topk_weights, entries * 4, *regions));
    rows_.push_back(rows);
    routing_.push_back(routing);
  }
  return absl::OkStatus();
}

void DeviceShard::Release() {
  rows_.clear();
  routing_.clear();
  held_.clear();
  ids_.clear();
  weights_.clear();
}

absl::Status DeviceShard::ReadRouting(const Shard& shard, runtime::Engine& engine) {
  std::vector<runtime::DeviceRead> reads;
  wide_ids_.resize(ids_.size());
  for (std::size_t i = 0; i < routing_.size(); ++i) {
    const DeviceRows& part = shard.device_rows[i];
    const std::int64_t at = part.first_row * shard.topk;
    const auto entries = static_cast<std::size_t>(part.num_rows * shard.topk);
    if (routing_[i].ids != nullptr) {
      void* const to = part.wide_ids ? static_cast<void*>(&wide_ids_[at]) : &ids_[at];
      reads.push_back({routing_[i].ids, to, entries * (part.wide_ids ? 8 : 4)});
    }
    if (routing_[i].weights != nullptr) {
      reads.push_back({routing_[i].weights, &weights_[at], entries * 4});
    }
  }
  return engine.ReadDevice(shard.slot, reads);
}

absl::Status DeviceShard::CheckIds(const DeviceRows& part, int topk, std::int64_t num_experts) {
  const std::int64_t at = part.first_row * topk;
  for (std::int64_t i = 0; i < part.num_rows * topk; ++i) {
    const std::int64_t id = part.wide_ids ? wide_ids_[at + i] : ids_[at + i];
    if (id < -1 || id >= num_experts) {
      return RefuseId(part, i, topk, id, num_experts);
    }
    ids_[at + i] = static_cast<std::int32_t>(id);
  }
  return absl::OkStatus();
}

absl::Status DeviceShard::CheckWeights(const DeviceRows& part, int topk) const {
  const std::int64_t at = part.first_row * topk;
  for (std::int64_t i = 0; i < part.num_rows * topk; ++i) {
    if (std::isfinite(weights_[at + i])) continue;
    return RefuseWeight(part, i, topk, weights_[at + i]);
  }
  return absl::OkStatus();
}

bool DeviceShard::LeaveRouting(const Shard& shard, const runtime::Engine& engine) {
  if (!shard.device_counts || !engine.dispatches_uncounted(shard.topk)) return false;
  if (rows_.size() > runtime::kMaxRoutedPieces) return false;
  std::int64_t num_routed = 0;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (routing_[i].ids == nullptr || routing_[i].weights == nullptr) return false;
    num_routed += rows_[i].num_rows;
  }
  if (num_routed != shard.num_tokens) return false;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    rows_[i].topk_ids = routing_[i].ids;
    rows_[i].topk_weights = routing_[i].weights;
    rows_[i].wide_ids = shard.device_rows[i].wide_ids;
  }
  return true;
}

void DeviceShard::TellFaults(const Shard& shard, std::int64_t num_experts,
                             std::span<const runtime::RoutingFault> found,
                             std::vector<RegionFault>& faults) {
  for (const runtime::RoutingFault& fault : found) {
    const DeviceRows& part = shard.device_rows[fault.piece];
    faults.push_back(
        {part.first_row, fault.in_weights
                             ? RefuseWeight(part, fault.entry, shard.topk, fault.weight)
                             : RefuseId(part, fault.entry, shard.topk, fault.id, num_experts)});
  }
}

absl::Status DeviceShard::TakeRouting(const Shard& shard, runtime::Engine& engine,
                                      const std::int32_t* ids, const float* weights,
                                      std::vector<RegionFault>& faults) {
  if (!shard.routed || std::none_of(shard.device_rows.begin(), shard.device_rows.end(), HasRouting))
    return absl::OkStatus();
  if (LeaveRouting(shard, engine)) return absl::OkStatus();
  const std::int64_t entries = shard.num_tokens * shard.topk;
  ids_.assign(ids, ids + entries);
  weights_.assign(weights, weights + entries);
  EPS_RETURN_IF_ERROR(ReadRouting(shard, engine));
  for (const DeviceRows& part : shard.device_rows) {
    absl::Status status;
    if (part.topk_ids) status = CheckIds(part, shard.topk, engine.model().num_experts);
    if (status.ok() && part.topk_weights) status = CheckWeights(part, shard.topk);
    if (status.ok()) continue;
    // The batch goes on for the others in it. Where the coordinator knows the ids it has counted
    // them, and they stay.
    const std::int64_t at = part.first_row * shard.topk;
    const std::int64_t count = part.num_rows * shard.topk;
    if (part.topk_ids) std::fill_n(ids_.begin() + at, count, -1);
    std::fill_n(weights_.begin() + at, count, 0.0F);
    faults.push_back({part.first_row, status});
  }
  return absl::OkStatus();
}

absl::Status DeviceShard::FetchHidden(const Shard& shard, runtime::Engine& engine,
                                      std::int64_t row_bytes, std::byte* host_rows) {
  std::vector<runtime::DeviceRead> reads;
  for (runtime::ShardDeviceRows& rows : rows_) {
    if (rows.hidden == nullptr) continue;
    reads.push_back({rows.hidden, host_rows + rows.first_row * row_bytes,
                     static_cast<std::size_t>(rows.num_rows * row_bytes)});
    rows.hidden = nullptr;
  }
  if (reads.empty()) return absl::OkStatus();
  return engine.ReadDevice(shard.slot, reads);
}

}  // namespace epserve::worker
