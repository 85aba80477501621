#include "server/coordinator/batch_store.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

// One request's tensors, as bytes, and its place among the batch's rows.
struct Segment {
  runtime::RowRange rows;
  std::span<const char> hidden;
  std::span<const std::int32_t> topk_ids;
  std::span<const float> topk_weights;
};

template <typename T>
void AppendBytes(std::string& out, std::span<const T> values, std::int64_t begin,
                 std::int64_t end) {
  const T* first = values.data() + begin;
  out.append(reinterpret_cast<const char*>(first),
             static_cast<std::size_t>(end - begin) * sizeof(T));
}

// Fills a shard's tensors with its rows of the segments.
void CutRows(std::span<const Segment> segments, runtime::RowRange rows, std::int64_t row_bytes,
             int topk, ShardMessage& shard) {
  shard.hidden.reserve(static_cast<std::size_t>(rows.size() * row_bytes));
  for (const Segment& segment : segments) {
    const std::int64_t begin = std::max(rows.begin, segment.rows.begin);
    const std::int64_t end = std::min(rows.end, segment.rows.end);
    if (begin >= end) continue;
    const std::int64_t from = begin - segment.rows.begin;
    const std::int64_t to = end - segment.rows.begin;
    AppendBytes(shard.hidden, segment.hidden, from * row_bytes, to * row_bytes);
    if (shard.routed) {
      AppendBytes(shard.topk_ids, segment.topk_ids, from * topk, to * topk);
      AppendBytes(shard.topk_weights, segment.topk_weights, from * topk, to * topk);
    }
  }
}

std::shared_ptr<const runtime::CountMatrix> CountRows(std::span<const Segment> segments,
                                                      std::int64_t num_tokens, int topk,
                                                      const runtime::Placement& placement) {
  std::vector<std::int32_t> joined;
  std::span<const std::int32_t> ids;
  if (segments.size() == 1) {
    ids = segments[0].topk_ids;
  } else {
    joined.reserve(static_cast<std::size_t>(num_tokens * topk));
    for (const Segment& segment : segments) {
      joined.insert(joined.end(), segment.topk_ids.begin(), segment.topk_ids.end());
    }
    ids = joined;
  }
  return std::make_shared<const runtime::CountMatrix>(
      runtime::ComputeCountMatrix(ids, num_tokens, topk, placement));
}

std::vector<ShardMessage> MakeShards(const ShardMessage& common, std::span<const ShardPlan> plans,
                                     std::span<const Segment> segments, std::int64_t row_bytes) {
  std::vector<ShardMessage> shards;
  shards.reserve(plans.size());
  for (const ShardPlan& plan : plans) {
    ShardMessage& shard = shards.emplace_back(common);
    shard.num_tokens = plan.rows.size();
    CutRows(segments, plan.rows, row_bytes, common.topk, shard);
  }
  return shards;
}

void KeepMost(const WorkerTimes& times, WorkerTimes& most) {
  most.assign_ns = std::max(most.assign_ns, times.assign_ns);
  most.counts_ns = std::max(most.counts_ns, times.counts_ns);
  most.dispatch_ns = std::max(most.dispatch_ns, times.dispatch_ns);
  most.ffn_ns = std::max(most.ffn_ns, times.ffn_ns);
  most.combine_ns = std::max(most.combine_ns, times.combine_ns);
}

}  // namespace

std::int64_t RowTypeBytes(RowType type) { return type == RowType::kFp32 ? 4 : 2; }

BatchStore::BatchStore(runtime::Placement placement, std::int64_t hidden, int topk)
    : placement_(std::move(placement)), hidden_(hidden), topk_(topk) {}

std::vector<ShardMessage> BatchStore::Start(const StartBatch& start,
                                            std::span<const ValidatedRequest* const> requests,
                                            TimeUs now_us) {
  KeptBatch& batch = batches_[{start.epoch, start.batch}];
  batch.layer = start.layer;
  batch.row_bytes = hidden_ * RowTypeBytes(start.row_type);
  batch.shards = start.shards;
  batch.outputs.resize(start.shards.size());
  batch.taken.assign(start.shards.size(), false);
  batch.started_us = now_us;

  std::vector<Segment> segments;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    segments.push_back({start.requests[i].rows, requests[i]->hidden, requests[i]->topk_ids,
                        requests[i]->topk_weights});
  }
  ShardMessage common;
  common.epoch = start.epoch;
  common.batch = start.batch;
  common.slot = start.slot;
  common.layer = start.layer;
  common.row_type = start.row_type;
  common.topk = topk_;
  common.routed = start.routed;
  common.trigger = start.trigger;
  if (start.routed) common.counts = CountRows(segments, start.num_tokens, topk_, placement_);
  return MakeShards(common, start.shards, segments, batch.row_bytes);
}

std::vector<ShardMessage> BatchStore::Start(const StartProbe& start, TimeUs now_us) {
  KeptBatch& batch = batches_[{start.epoch, start.batch}];
  batch.layer = start.layer;
  batch.row_bytes = hidden_ * RowTypeBytes(RowType::kFp32);
  batch.shards = start.shards;
  batch.outputs.resize(start.shards.size());
  batch.taken.assign(start.shards.size(), false);
  batch.started_us = now_us;
  batch.is_probe = true;
  batch.probe = server::MakeProbeBatch(placement_, hidden_, topk_);

  const std::span<const float> rows = batch.probe.hidden;
  const Segment segment = {
      {0, batch.probe.num_tokens},
      std::span<const char>(reinterpret_cast<const char*>(rows.data()), rows.size_bytes()),
      batch.probe.topk_ids,
      batch.probe.topk_weights};
  ShardMessage common;
  common.epoch = start.epoch;
  common.batch = start.batch;
  common.slot = start.slot;
  common.layer = start.layer;
  common.topk = topk_;
  common.trigger = start.trigger;
  common.counts = CountRows({&segment, 1}, batch.probe.num_tokens, topk_, placement_);
  return MakeShards(common, start.shards, {&segment, 1}, batch.row_bytes);
}

absl::Status BatchStore::TakeOutput(const BatchDone& done, std::string output,
                                    const WorkerTimes& times, TimeUs now_us, int* rank) {
  *rank = -1;
  KeptBatch* batch = Find(done.epoch, done.batch);
  if (batch == nullptr) return absl::OkStatus();
  const auto plan = std::find_if(batch->shards.begin(), batch->shards.end(),
                                 [&](const ShardPlan& p) { return p.stream == done.stream; });
  if (plan == batch->shards.end()) return absl::OkStatus();
  const std::size_t index = static_cast<std::size_t>(plan - batch->shards.begin());
  if (batch->taken[index]) return absl::OkStatus();
  const std::int64_t expected = plan->rows.size() * batch->row_bytes;
  if (static_cast<std::int64_t>(output.size()) != expected) {
    return absl::InternalError(absl::StrCat("batch: output of rank ", plan->rank, " has ",
                                            output.size(), " bytes, which differs from the ",
                                            expected, " of its ", plan->rows.size(), " rows"));
  }
  batch->taken[index] = true;
  batch->outputs[index] = std::move(output);
  batch->last_done_us = now_us;
  KeepMost(times, batch->times);
  *rank = plan->rank;
  return absl::OkStatus();
}

absl::Status BatchStore::CopyRows(const KeptBatch& batch, runtime::RowRange rows,
                                  std::span<char> out) {
  if (static_cast<std::int64_t>(out.size()) != rows.size() * batch.row_bytes) {
    return absl::InternalError(absl::StrCat("batch: place for the output has ", out.size(),
                                            " bytes, which differs from the ",
                                            rows.size() * batch.row_bytes, " of its rows"));
  }
  std::int64_t num_copied = 0;
  for (std::size_t i = 0; i < batch.shards.size(); ++i) {
    const runtime::RowRange& part = batch.shards[i].rows;
    const std::int64_t begin = std::max(rows.begin, part.begin);
    const std::int64_t end = std::min(rows.end, part.end);
    if (begin >= end || !batch.taken[i]) continue;
    std::memcpy(out.data() + (begin - rows.begin) * batch.row_bytes,
                batch.outputs[i].data() + (begin - part.begin) * batch.row_bytes,
                static_cast<std::size_t>((end - begin) * batch.row_bytes));
    num_copied += end - begin;
  }
  if (num_copied != rows.size()) {
    return absl::InternalError(
        absl::StrCat("batch: ", num_copied, " output rows are there of ", rows.size()));
  }
  return absl::OkStatus();
}

KeptBatch* BatchStore::Find(EpochId epoch, BatchId batch) {
  const auto it = batches_.find({epoch, batch});
  return it == batches_.end() ? nullptr : &it->second;
}

void BatchStore::Erase(EpochId epoch, BatchId batch) { batches_.erase({epoch, batch}); }

}  // namespace epserve::coordinator
