#include "server/coordinator/batch_store.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::coordinator {
namespace {

// Copies elements [begin, end) of `values` to `out` and moves it on.
template <typename T>
void Append(std::span<const T> values, std::int64_t begin, std::int64_t end, char** out) {
  const auto bytes = static_cast<std::size_t>(end - begin) * sizeof(T);
  if (bytes > 0) std::memcpy(*out, values.data() + begin, bytes);
  *out += bytes;
}

// Values that are not here leave their place as it is.
template <typename T>
void AppendOrSkip(std::span<const T> values, std::int64_t begin, std::int64_t end, char** out) {
  if (!values.empty()) return Append(values, begin, end, out);
  *out += static_cast<std::size_t>(end - begin) * sizeof(T);
}

void KeepMost(const WorkerTimes& times, WorkerTimes& most) {
  most.assign_ns = std::max(most.assign_ns, times.assign_ns);
  most.counts_ns = std::max(most.counts_ns, times.counts_ns);
  most.dispatch_ns = std::max(most.dispatch_ns, times.dispatch_ns);
  most.ffn_ns = std::max(most.ffn_ns, times.ffn_ns);
  most.combine_ns = std::max(most.combine_ns, times.combine_ns);
}

}  // namespace

// One request's tensors, as bytes, and its place among the batch's rows.
struct BatchStore::Segment {
  runtime::RowRange rows;
  std::span<const char> hidden;  // empty where they lie in a region
  std::span<const std::int32_t> topk_ids;
  std::span<const float> topk_weights;
  const RawView* pieces = nullptr;  // in place of `hidden`, if not in one
};

namespace {

// `took_ns` receives what it cost.
std::shared_ptr<const runtime::CountMatrix> CountRows(
    std::span<const std::span<const std::int32_t>> ids_of_segments,
    const std::vector<ShardPlan>& plans, int topk, const runtime::Placement& placement,
    std::int64_t* took_ns) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::int32_t> joined;
  std::span<const std::int32_t> ids;
  if (ids_of_segments.size() == 1) {
    ids = ids_of_segments[0];
  } else {
    joined.reserve(static_cast<std::size_t>(plans.back().rows.end * topk));
    for (const auto& part : ids_of_segments) joined.insert(joined.end(), part.begin(), part.end());
    ids = joined;
  }
  std::vector<runtime::RowRange> shards;
  shards.reserve(plans.size());
  for (const ShardPlan& plan : plans) shards.push_back(plan.rows);
  auto counts = std::make_shared<const runtime::CountMatrix>(
      runtime::ComputeCountMatrix(ids, shards, topk, placement));
  *took_ns = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  return counts;
}

// Rows of one request, of one shard.
struct PartRows {
  std::int64_t from = 0;  // among the request's
  std::int64_t num = 0;
  std::int64_t first_row = 0;  // among the shard's
};

RegionRows RowsIn(const RegionWindow& window, const PartRows& rows, std::int64_t row_bytes) {
  const auto offset = window.offset_bytes + static_cast<std::uint64_t>(rows.from * row_bytes);
  return {window.region->info().id, window.region->label(), window.region->ObjectOffset(offset),
          rows.first_row, rows.num};
}

// How many of the rows lie in CUDA memory, or go there.
std::int64_t NumRowsIn(RegionWindow KeptPart::*window, runtime::RowRange rows,
                       const KeptBatch& batch) {
  std::int64_t count = 0;
  for (const KeptPart& part : batch.parts) {
    if (!InCuda((part.*window).region.get())) continue;
    count += std::max<std::int64_t>(
        std::min(rows.end, part.rows.end) - std::max(rows.begin, part.rows.begin), 0);
  }
  return count;
}

std::optional<server::DevicePlace> PlaceIn(const RegionWindow& window, std::int64_t from,
                                           std::int64_t row_bytes) {
  if (!InCuda(window.region.get())) return std::nullopt;
  return server::DevicePlace{window.region->info().id,
                             window.offset_bytes + static_cast<std::uint64_t>(from * row_bytes)};
}

// Tells the worker what of the rows lies in CUDA memory, or goes there.
void PlaceOnDevice(const PartRows& rows, KeptBatch& batch, const KeptPart& part,
                   ShardMessage& shard) {
  DeviceRows on_device;
  on_device.first_row = rows.first_row;
  on_device.num_rows = rows.num;
  on_device.request_row = rows.from;
  on_device.hidden = PlaceIn(part.source, rows.from, batch.row_bytes);
  on_device.output = PlaceIn(part.output, rows.from, batch.row_bytes);
  on_device.topk_ids = PlaceIn(part.ids, rows.from, shard.topk * (part.wide_ids ? 8 : 4));
  on_device.topk_weights = PlaceIn(part.weights, rows.from, std::int64_t{shard.topk} * 4);
  on_device.wide_ids = part.wide_ids;
  batch.device_bytes += rows.num * batch.row_bytes *
                        (int{on_device.hidden.has_value()} + int{on_device.output.has_value()});
  if (on_device.hidden || on_device.output || on_device.topk_ids || on_device.topk_weights) {
    shard.device_rows.push_back(std::move(on_device));
  }
}

// Tells the worker where to find the rows and where to leave them, or reads them to `hidden`, which
// is null where none are.
void PlaceRows(const PartRows& rows, bool direct, KeptBatch& batch, KeptPart& part, char* hidden,
               ShardMessage& shard) {
  const std::int64_t bytes = rows.num * batch.row_bytes;
  std::int64_t& counted = direct ? batch.direct_bytes : batch.copied_bytes;
  PlaceOnDevice(rows, batch, part, shard);
  if (part.output.region != nullptr && !InCuda(part.output.region.get())) {
    counted += bytes;
    if (direct) shard.targets.push_back(RowsIn(part.output, rows, batch.row_bytes));
  }
  if (part.source.region == nullptr || InCuda(part.source.region.get())) return;
  counted += bytes;
  if (direct) {
    shard.sources.push_back(RowsIn(part.source, rows, batch.row_bytes));
    return;
  }
  const std::span<char> place(hidden, static_cast<std::size_t>(bytes));
  const absl::Status read = part.source.region->Read(
      part.source.offset_bytes + static_cast<std::uint64_t>(rows.from * batch.row_bytes), place);
  if (read.ok()) return;
  // The batch goes on for the others in it; nobody gets to see what comes of these rows.
  std::fill(place.begin(), place.end(), '\0');
  part.fault = read;
}

}  // namespace

BatchStore::BatchStore(runtime::Placement placement, std::int64_t hidden, int topk)
    : placement_(std::move(placement)), hidden_(hidden), topk_(topk) {}

void BatchStore::OpenArena(EpochId epoch, std::shared_ptr<RowBlocks> blocks) {
  arena_epoch_ = epoch;
  blocks_ = std::move(blocks);
  arena_streams_.clear();
  sharing_streams_.clear();
  regions_.OpenEpoch();
}

void BatchStore::UseArena(EpochId epoch, StreamId stream) {
  if (blocks_ != nullptr && epoch == arena_epoch_) arena_streams_.insert(stream);
}

void BatchStore::UseRegions(EpochId epoch, StreamId stream) {
  if (epoch == arena_epoch_ && arena_streams_.contains(stream)) regions_.AddReachable(stream);
}

void BatchStore::UseSharedRows(EpochId epoch, StreamId stream) {
  if (epoch == arena_epoch_ && arena_streams_.contains(stream)) sharing_streams_.insert(stream);
}

void BatchStore::SealArena(EpochId epoch) {
  if (blocks_ != nullptr && epoch == arena_epoch_) blocks_->arena().Seal();
}

void BatchStore::CloseArena(EpochId epoch) {
  if (epoch == arena_epoch_) OpenArena(0, nullptr);
}

KeptBatch& BatchStore::Keep(EpochId epoch, BatchId id, int slot,
                            const std::vector<ShardPlan>& plans, RowType row_type, TimeUs now_us) {
  KeptBatch& batch = batches_[{epoch, id}];
  batch.slot = slot;
  batch.row_bytes = hidden_ * RowTypeBytes(row_type);
  batch.shards = plans;
  batch.outputs.resize(plans.size());
  batch.taken.assign(plans.size(), false);
  batch.ended.assign(plans.size(), false);
  batch.direct.assign(plans.size(), false);
  batch.on_device.assign(plans.size(), false);
  batch.in_arena.assign(plans.size(), false);
  batch.answers_rows.assign(plans.size(), true);
  batch.times_of_rank.resize(plans.size());
  batch.started_us = now_us;
  batch.blocks = nullptr;
  if (blocks_ == nullptr || epoch != arena_epoch_) return batch;
  batch.blocks = blocks_->Take(static_cast<std::uint64_t>(plans.back().rows.end * batch.row_bytes));
  if (batch.blocks == nullptr) return batch;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    batch.in_arena[i] = arena_streams_.contains(plans[i].stream);
    batch.answers_rows[i] = !batch.in_arena[i];
    batch.direct[i] = batch.in_arena[i] && regions_.IsReachable(plans[i].stream);
  }
  return batch;
}

// Puts the rows of the segments that are of the shard `index` into the arena, or into the message;
// of rows in pieces only what is to be copied where.
void BatchStore::CutRows(std::span<const Segment> segments, std::size_t index, KeptBatch& batch,
                         ShardMessage& shard) {
  const ShardPlan& plan = batch.shards[index];
  const std::int64_t first = plan.rows.begin;
  const std::int64_t row_bytes = batch.row_bytes;
  const int topk = shard.routed ? shard.topk : 0;
  char* hidden;
  char* ids;
  char* weights;
  if (shard.in_arena) {
    const runtime::RowArena& arena = blocks_->arena();
    hidden = reinterpret_cast<char*>(batch.blocks->rows()) + first * row_bytes;
    ids = reinterpret_cast<char*>(arena.topk_ids(batch.slot) + first * topk);
    weights = reinterpret_cast<char*>(arena.topk_weights(batch.slot) + first * topk);
  } else {
    const auto index_bytes = static_cast<std::size_t>(plan.rows.size() * topk) * 4;
    if (NumRowsIn(&KeptPart::source, plan.rows, batch) < plan.rows.size()) {
      shard.hidden.resize(static_cast<std::size_t>(plan.rows.size() * row_bytes));
    }
    batch.answers_rows[index] =
        plan.rows.size() == 0 || NumRowsIn(&KeptPart::output, plan.rows, batch) < plan.rows.size();
    shard.topk_ids.resize(index_bytes);
    shard.topk_weights.resize(index_bytes);
    hidden = shard.hidden.empty() ? nullptr : shard.hidden.data();
    ids = shard.topk_ids.data();
    weights = shard.topk_weights.data();
  }
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const Segment& segment = segments[i];
    const std::int64_t begin = std::max(plan.rows.begin, segment.rows.begin);
    const std::int64_t end = std::min(plan.rows.end, segment.rows.end);
    if (begin >= end) continue;
    const std::int64_t from = begin - segment.rows.begin;
    const std::int64_t to = end - segment.rows.begin;
    if (i < batch.parts.size()) {
      PlaceRows({from, to - from, begin - first}, batch.direct[index], batch, batch.parts[i],
                hidden, shard);
    }
    if (segment.pieces != nullptr) {
      segment.pieces->ForEachPiece(static_cast<std::size_t>(from * row_bytes),
                                   static_cast<std::size_t>((to - from) * row_bytes),
                                   [&](std::span<const char> piece) {
                                     copies_.push_back({piece.data(), hidden, piece.size()});
                                     hidden += piece.size();
                                   });
    } else if (segment.hidden.empty()) {
      if (hidden != nullptr) hidden += (to - from) * row_bytes;
    } else {
      Append(segment.hidden, from * row_bytes, to * row_bytes, &hidden);
    }
    AppendOrSkip(segment.topk_ids, from * topk, to * topk, &ids);
    AppendOrSkip(segment.topk_weights, from * topk, to * topk, &weights);
  }
  batch.on_device[index] = !shard.device_rows.empty();
}

std::vector<ShardMessage> BatchStore::MakeShards(const ShardMessage& common, KeptBatch& batch,
                                                 std::span<const Segment> segments) {
  std::vector<ShardMessage> shards;
  shards.reserve(batch.shards.size());
  for (std::size_t i = 0; i < batch.shards.size(); ++i) {
    ShardMessage& shard = shards.emplace_back(common);
    shard.slot = batch.slot;
    shard.num_tokens = batch.shards[i].rows.size();
    shard.in_arena = batch.in_arena[i];
    if (shard.in_arena) {
      shard.row_block = batch.blocks->first();
      shard.first_row = batch.shards[i].rows.begin;
    }
    CutRows(segments, i, batch, shard);
  }
  if (!copies_.empty()) copier_.Copy(copies_);
  copies_.clear();
  ShareRows(batch, shards);
  for (const KeptPart& part : batch.parts) {
    for (const RegionWindow* window : {&part.source, &part.output}) {
      if (window->region != nullptr && !InCuda(window->region.get()))
        regions_.Named(window->region);
    }
  }
  return shards;
}

// Not where a worker is still to bring ids there, or rows from a device.
void BatchStore::ShareRows(const KeptBatch& batch, std::vector<ShardMessage>& shards) const {
  std::vector<std::int64_t> shard_begin;
  shard_begin.reserve(shards.size() + 1);
  bool rows_follow = false;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const ShardMessage& shard = shards[i];
    if (!shard.in_arena || !sharing_streams_.contains(batch.shards[i].stream) || !shard.routed ||
        !shard.device_rows.empty()) {
      return;
    }
    rows_follow = rows_follow || !shard.sources.empty();
    shard_begin.push_back(batch.shards[i].rows.begin);
  }
  shard_begin.push_back(batch.shards.back().rows.end);
  for (ShardMessage& shard : shards) {
    shard.shard_begin = shard_begin;
    shard.rows_follow = rows_follow;
  }
}

std::vector<ShardMessage> BatchStore::Start(const StartBatch& start,
                                            std::span<const ValidatedRequest* const> requests,
                                            TimeUs now_us) {
  KeptBatch& batch =
      Keep(start.epoch, start.batch, start.slot, start.shards, start.row_type, now_us);
  batch.layer = start.layer;
  batch.counts = start.counts;

  std::vector<Segment> segments;
  std::vector<std::span<const std::int32_t>> ids;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const RawView& pieces = requests[i]->hidden_pieces;
    segments.push_back({start.requests[i].rows, requests[i]->hidden, requests[i]->topk_ids,
                        requests[i]->topk_weights, pieces.size() > 0 ? &pieces : nullptr});
    ids.push_back(segments.back().topk_ids);
    batch.parts.push_back({.request = start.requests[i].request,
                           .rows = start.requests[i].rows,
                           .source = requests[i]->source,
                           .output = requests[i]->output,
                           .ids = requests[i]->ids_source,
                           .weights = requests[i]->weights_source,
                           .wide_ids = requests[i]->wide_ids,
                           .fault = absl::OkStatus()});
  }
  ShardMessage common;
  common.epoch = start.epoch;
  common.batch = start.batch;
  common.layer = start.layer;
  common.row_type = start.row_type;
  common.topk = topk_;
  common.routed = start.routed;
  common.trigger = start.trigger;
  common.device_counts = start.counts == CountExchange::kDevice;
  if (start.counts == CountExchange::kCoordinator) {
    common.counts = CountRows(ids, batch.shards, topk_, placement_, &batch.times.counts_ns);
  }
  return MakeShards(common, batch, segments);
}

std::vector<ShardMessage> BatchStore::Start(const StartProbe& start, TimeUs now_us) {
  KeptBatch& batch =
      Keep(start.epoch, start.batch, start.slot, start.shards, RowType::kFp32, now_us);
  batch.layer = start.layer;
  batch.is_probe = true;
  batch.counts = start.counts;
  batch.probe = server::MakeProbeBatch(placement_, hidden_, topk_);

  const std::span<const float> rows = batch.probe.hidden;
  const Segment segment = {
      {0, batch.probe.num_tokens},
      std::span<const char>(reinterpret_cast<const char*>(rows.data()), rows.size_bytes()),
      batch.probe.topk_ids,
      batch.probe.topk_weights};
  const std::span<const std::int32_t> ids = segment.topk_ids;
  ShardMessage common;
  common.epoch = start.epoch;
  common.batch = start.batch;
  common.layer = start.layer;
  common.topk = topk_;
  common.trigger = start.trigger;
  common.device_counts = start.counts == CountExchange::kDevice;
  if (start.counts == CountExchange::kCoordinator) {
    common.counts = CountRows({&ids, 1}, batch.shards, topk_, placement_, &batch.times.counts_ns);
  }
  return MakeShards(common, batch, {&segment, 1});
}

void BatchStore::HoldBack(EpochId epoch, BatchId id, const ShardPlan& plan, ShardMessage shard) {
  if (KeptBatch* batch = Find(epoch, id)) batch->held_back.push_back({plan, std::move(shard)});
}

std::vector<HeldShard> BatchStore::TakeHeldBack(EpochId epoch, BatchId id) {
  KeptBatch* batch = Find(epoch, id);
  return batch == nullptr ? std::vector<HeldShard>() : std::exchange(batch->held_back, {});
}

absl::Status BatchStore::TakeOutput(const BatchDone& done, std::string output,
                                    const WorkerTimes& times, TimeUs now_us, int* rank,
                                    std::span<const RegionFault> faults) {
  *rank = -1;
  KeptBatch* batch = Find(done.epoch, done.batch);
  if (batch == nullptr) return absl::OkStatus();
  const auto plan = std::find_if(batch->shards.begin(), batch->shards.end(),
                                 [&](const ShardPlan& p) { return p.stream == done.stream; });
  if (plan == batch->shards.end()) return absl::OkStatus();
  const std::size_t index = static_cast<std::size_t>(plan - batch->shards.begin());
  if (batch->taken[index]) return absl::OkStatus();
  const std::int64_t expected =
      batch->answers_rows[index] ? plan->rows.size() * batch->row_bytes : 0;
  if (static_cast<std::int64_t>(output.size()) != expected) {
    return absl::InternalError(absl::StrCat("batch: output of rank ", plan->rank, " has ",
                                            output.size(), " bytes, which differs from the ",
                                            expected, " of its ", plan->rows.size(), " rows"));
  }
  for (const RegionFault& fault : faults) {
    const std::int64_t row = plan->rows.begin + fault.first_row;
    for (KeptPart& part : batch->parts) {
      if (row >= part.rows.begin && row < part.rows.end) part.fault.Update(fault.status);
    }
  }
  batch->taken[index] = true;
  batch->ended[index] = true;
  batch->outputs[index] = std::move(output);
  batch->last_done_us = now_us;
  KeepMost(times, batch->times);
  batch->times_of_rank[index] = times;
  *rank = plan->rank;
  return absl::OkStatus();
}

void BatchStore::TakeFailure(const BatchDone& done) {
  KeptBatch* batch = Find(done.epoch, done.batch);
  if (batch == nullptr) return;
  for (std::size_t i = 0; i < batch->shards.size(); ++i) {
    if (batch->shards[i].stream == done.stream) batch->ended[i] = true;
  }
}

KeptBatch* BatchStore::Find(EpochId epoch, BatchId batch) {
  const auto it = batches_.find({epoch, batch});
  return it == batches_.end() ? nullptr : &it->second;
}

void BatchStore::Erase(EpochId epoch, BatchId batch) { batches_.erase({epoch, batch}); }

void BatchStore::Drop(EpochId epoch, BatchId id, const std::function<bool(StreamId)>& is_open) {
  const KeptBatch* batch = Find(epoch, id);
  if (batch == nullptr) return;
  std::set<StreamId> at_it;
  for (std::size_t i = 0; i < batch->shards.size(); ++i) {
    const StreamId stream = batch->shards[i].stream;
    const bool touches =
        batch->shards[i].rows.size() > 0 && (batch->direct[i] || batch->on_device[i]);
    if (touches && !batch->ended[i] && is_open(stream)) at_it.insert(stream);
  }
  RegionUse::Regions regions;
  for (const KeptPart& part : batch->parts) {
    for (const RegionWindow* window : {&part.source, &part.output, &part.ids, &part.weights}) {
      if (window->region != nullptr) regions.push_back(window->region);
    }
  }
  regions_.HoldFor(std::move(at_it), std::move(regions));
  Erase(epoch, id);
}

}  // namespace epserve::coordinator
