#include "server/coordinator/control_proto_convert.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

// A code that a worker made up must not pass for OK, nor for a code that does not exist.
absl::StatusCode CodeOf(std::int32_t code) {
  constexpr std::int32_t kHighest = static_cast<std::int32_t>(absl::StatusCode::kUnauthenticated);
  if (code < 0 || code > kHighest) return absl::StatusCode::kUnknown;
  return static_cast<absl::StatusCode>(code);
}

// Never OK where `code` is not 0, nor without a message.
absl::Status ConvertError(std::int32_t code, const std::string& message) {
  const absl::StatusCode known = CodeOf(code);
  return absl::Status(known == absl::StatusCode::kOk ? absl::StatusCode::kUnknown : known,
                      message.empty() ? "worker gave no reason" : message);
}

DeviceRegionState ConvertState(const v1::DeviceRegionOpened& in) {
  if (in.code() == 0) return {in.region(), absl::OkStatus()};
  return {in.region(), ConvertError(in.code(), in.message())};
}

BatchDone ConvertBatchDone(StreamId stream, v1::BatchDone& in, WorkerReport& report) {
  report.output = std::move(*in.mutable_output());
  const v1::PhaseTimes& times = in.times();
  report.times.start_ns = times.start_monotonic_ns();
  report.times.assign_ns = std::max<std::int64_t>(times.assign_ns(), 0);
  report.times.counts_ns = std::max<std::int64_t>(times.counts_ns(), 0);
  report.times.dispatch_ns = std::max<std::int64_t>(times.dispatch_ns(), 0);
  report.times.ffn_ns = std::max<std::int64_t>(times.ffn_ns(), 0);
  report.times.combine_ns = std::max<std::int64_t>(times.combine_ns(), 0);
  report.local_expert_rows.assign(in.local_expert_rows().begin(), in.local_expert_rows().end());
  for (const v1::RegionFault& fault : in.region_faults()) {
    report.region_faults.push_back(
        {fault.first_row(), ConvertError(fault.code(), fault.message())});
  }
  BatchDone out;
  out.stream = stream;
  out.epoch = in.epoch();
  out.batch = in.batch();
  out.code = CodeOf(in.code());
  out.message = std::move(*in.mutable_message());
  if (out.code != absl::StatusCode::kOk && out.message.empty()) {
    out.message = "worker gave no reason";
  }
  return out;
}

Counts ConvertCounts(StreamId stream, const v1::Counts& in) {
  Counts out;
  out.stream = stream;
  out.epoch = in.epoch();
  out.batch = in.batch();
  out.rows_to_rank.assign(in.rows_to_rank().begin(), in.rows_to_rank().end());
  out.rows_per_expert.assign(in.rows_per_expert().begin(), in.rows_per_expert().end());
  return out;
}

WorkerFailure ConvertFailure(StreamId stream, const v1::WorkerFailure& in) {
  WorkerFailure out;
  out.stream = stream;
  out.code = CodeOf(in.code());
  if (out.code == absl::StatusCode::kOk) out.code = absl::StatusCode::kUnknown;
  out.message = in.message().empty() ? "worker gave no reason" : in.message();
  return out;
}

v1::TriggerMode ToProto(TriggerMode trigger) {
  return trigger == TriggerMode::kSeparate ? v1::TRIGGER_SEPARATE : v1::TRIGGER_TOGETHER;
}

v1::RowType ToProto(RowType type) {
  switch (type) {
    case RowType::kFp32:
      return v1::ROW_TYPE_FP32;
    case RowType::kFp16:
      return v1::ROW_TYPE_FP16;
    case RowType::kBf16:
      return v1::ROW_TYPE_BF16;
  }
  return v1::ROW_TYPE_UNSPECIFIED;
}

void FillCounts(EpochId epoch, BatchId batch, const runtime::CountMatrix& in,
                v1::CountMatrix* out) {
  out->set_epoch(epoch);
  out->set_batch(batch);
  out->mutable_rows()->Assign(in.rows.begin(), in.rows.end());
  out->mutable_rows_per_expert()->Assign(in.rows_per_expert.begin(), in.rows_per_expert.end());
}

// One overload for each kind of message; `in` may be moved from.
void Fill(AssignRank& in, v1::CoordinatorMessage& out) {
  out.mutable_assignment()->set_rank(in.rank);
  out.mutable_assignment()->set_num_ranks(in.placement.num_ranks());
  out.mutable_assignment()->mutable_first_expert()->Assign(in.placement.first_expert.begin(),
                                                           in.placement.first_expert.end());
}

void Fill(SendStandby& in, v1::CoordinatorMessage& out) {
  out.mutable_standby()->set_reason(std::move(in.reason));
}

void FillRegion(DeviceRegionInfo& in, v1::DeviceRegion* out) {
  out->set_region(in.region);
  out->set_label(std::move(in.label));
  out->set_handle(std::move(in.handle));
  out->set_device_id(in.device_id);
  out->set_size_bytes(in.size_bytes);
}

void Fill(CreateHeapMessage& in, v1::CoordinatorMessage& out) {
  out.mutable_create_heap()->set_epoch(in.epoch);
  out.mutable_create_heap()->set_row_arena(std::move(in.row_arena));
  out.mutable_create_heap()->set_region_socket(std::move(in.regions.socket));
  out.mutable_create_heap()->set_region_secret(std::move(in.regions.secret));
  for (DeviceRegionInfo& region : in.device_regions) {
    FillRegion(region, out.mutable_create_heap()->add_device_regions());
  }
}

void Fill(SendOpenPeers& in, v1::CoordinatorMessage& out) {
  out.mutable_open_peers()->set_epoch(in.epoch);
  for (std::string& handle : in.handles) out.mutable_open_peers()->add_handles(std::move(handle));
}

void Fill(SendEpochStarted& in, v1::CoordinatorMessage& out) {
  out.mutable_epoch_started()->set_epoch(in.epoch);
}

void Fill(SendEpochEnded& in, v1::CoordinatorMessage& out) {
  out.mutable_epoch_ended()->set_epoch(in.epoch);
  out.mutable_epoch_ended()->set_reason(std::move(in.reason));
}

void Fill(GrantLease& in, v1::CoordinatorMessage& out) {
  out.mutable_lease()->set_epoch(in.epoch);
  out.mutable_lease()->set_echo_monotonic_us(in.echo_us);
  out.mutable_lease()->set_duration_us(in.duration_us);
}

void Fill(SendShutdown& in, v1::CoordinatorMessage& out) {
  out.mutable_shutdown()->set_reason(std::move(in.reason));
}

void Fill(RejectWorker& in, v1::CoordinatorMessage& out) {
  out.mutable_rejected()->set_code(static_cast<std::int32_t>(in.code));
  out.mutable_rejected()->set_message(std::move(in.message));
}

void FillRows(RegionRows& in, v1::RegionRows* out) {
  out->set_region(in.region);
  out->set_label(std::move(in.label));
  out->set_object_offset(in.object_offset);
  out->set_first_row(in.first_row);
  out->set_num_rows(in.num_rows);
}

void FillRows(const DeviceRows& in, v1::DeviceRows* out) {
  const auto fill = [](const std::optional<server::DevicePlace>& place, auto mutable_place) {
    if (!place.has_value()) return;
    v1::DevicePlace* const filled = mutable_place();
    filled->set_region(place->region);
    filled->set_offset(place->offset_bytes);
  };
  out->set_first_row(in.first_row);
  out->set_num_rows(in.num_rows);
  out->set_request_row(in.request_row);
  fill(in.hidden, [out] { return out->mutable_hidden(); });
  fill(in.topk_ids, [out] { return out->mutable_topk_ids(); });
  fill(in.topk_weights, [out] { return out->mutable_topk_weights(); });
  fill(in.output, [out] { return out->mutable_output(); });
  out->set_wide_ids(in.wide_ids);
}

void Fill(ShardMessage& in, v1::CoordinatorMessage& out) {
  v1::Shard* shard = out.mutable_shard();
  shard->set_epoch(in.epoch);
  shard->set_batch(in.batch);
  shard->set_slot(in.slot);
  shard->set_layer(in.layer);
  shard->set_row_type(ToProto(in.row_type));
  shard->set_num_tokens(in.num_tokens);
  shard->set_topk(in.topk);
  shard->set_hidden(std::move(in.hidden));
  shard->set_routed(in.routed);
  shard->set_topk_ids(std::move(in.topk_ids));
  shard->set_topk_weights(std::move(in.topk_weights));
  shard->set_in_arena(in.in_arena);
  shard->set_row_block(in.row_block);
  shard->set_first_row(in.first_row);
  shard->mutable_shard_begin()->Assign(in.shard_begin.begin(), in.shard_begin.end());
  shard->set_rows_follow(in.rows_follow);
  for (RegionRows& rows : in.sources) FillRows(rows, shard->add_sources());
  for (RegionRows& rows : in.targets) FillRows(rows, shard->add_targets());
  for (const DeviceRows& rows : in.device_rows) FillRows(rows, shard->add_device_rows());
  shard->set_trigger(ToProto(in.trigger));
  shard->set_device_counts(in.device_counts);
  if (in.counts != nullptr) FillCounts(in.epoch, in.batch, *in.counts, shard->mutable_counts());
}

void Fill(CountMatrixMessage& in, v1::CoordinatorMessage& out) {
  FillCounts(in.epoch, in.batch, *in.counts, out.mutable_count_matrix());
}

void Fill(DispatchTriggerMessage& in, v1::CoordinatorMessage& out) {
  out.mutable_dispatch_trigger()->set_epoch(in.epoch);
  out.mutable_dispatch_trigger()->set_batch(in.batch);
}

void Fill(CombineTriggerMessage& in, v1::CoordinatorMessage& out) {
  out.mutable_combine_trigger()->set_epoch(in.epoch);
  out.mutable_combine_trigger()->set_batch(in.batch);
}

void Fill(ForgetRegionsMessage& in, v1::CoordinatorMessage& out) {
  out.mutable_forget_regions()->mutable_regions()->Assign(in.regions.begin(), in.regions.end());
}

void Fill(OpenDeviceRegionMessage& in, v1::CoordinatorMessage& out) {
  FillRegion(in.region, out.mutable_open_device_region()->mutable_region());
}

void Fill(CloseDeviceRegionsMessage& in, v1::CoordinatorMessage& out) {
  out.mutable_close_device_regions()->mutable_regions()->Assign(in.regions.begin(),
                                                                in.regions.end());
}

}  // namespace

HelloInfo FromProto(const v1::Hello& hello) {
  HelloInfo info;
  info.worker_id = hello.worker_id();
  info.incarnation = hello.incarnation();
  info.version = hello.version();
  info.backend = hello.backend();
  info.fingerprint = hello.model().fingerprint();
  info.last_epoch = hello.last_epoch();
  info.held_rank = hello.held_rank();
  info.held_num_ranks = hello.held_num_ranks();
  info.node = hello.node();
  info.process = {hello.process_home(), hello.pid(), hello.process_start_ticks()};
  info.max_batch_tokens = hello.max_batch_tokens();
  info.cluster_id = hello.cluster_id();
  info.num_slots = hello.num_slots();
  info.device_counts = hello.device_counts();
  return info;
}

absl::StatusOr<WorkerReport> FromProto(StreamId stream, v1::WorkerMessage& message) {
  WorkerReport report;
  switch (message.message_case()) {
    case v1::WorkerMessage::kHello:
      return absl::InvalidArgumentError("control: a second Hello came on one stream");
    case v1::WorkerMessage::kHeartbeat: {
      const v1::Heartbeat& in = message.heartbeat();
      report.event = Heartbeat{stream, in.epoch(), in.sent_monotonic_us(), in.resident_bytes()};
      return report;
    }
    case v1::WorkerMessage::kLoadProgress: {
      const v1::LoadProgress& in = message.load_progress();
      report.event = WorkerLoadProgress{stream, in.loaded_bytes(), in.total_bytes()};
      return report;
    }
    case v1::WorkerMessage::kLoaded: {
      const v1::Loaded& in = message.loaded();
      report.event =
          WorkerLoaded{stream, in.rank(), in.num_ranks(), in.weight_bytes(), in.heap_bytes()};
      return report;
    }
    case v1::WorkerMessage::kHeapCreated: {
      v1::HeapCreated& in = *message.mutable_heap_created();
      report.event = HeapCreated{stream, in.epoch(), std::move(*in.mutable_handle())};
      report.row_arena_mapped = in.row_arena_mapped();
      report.regions_reachable = in.regions_reachable();
      report.takes_shared_batches = in.takes_shared_batches();
      report.handle_type = std::move(*in.mutable_handle_type());
      for (const v1::DeviceRegionOpened& refused : in.refused_regions()) {
        report.refused.push_back(ConvertState(refused));
      }
      return report;
    }
    case v1::WorkerMessage::kPeersOpened: {
      const v1::PeersOpened& in = message.peers_opened();
      report.probe_output.assign(in.probe_output().begin(), in.probe_output().end());
      report.event = PeersOpened{stream, in.epoch()};
      return report;
    }
    case v1::WorkerMessage::kCounts:
      report.event = ConvertCounts(stream, message.counts());
      return report;
    case v1::WorkerMessage::kPhaseDone: {
      const v1::PhaseDone& in = message.phase_done();
      const Phase phase = in.phase() == v1::PHASE_COMBINE ? Phase::kCombine : Phase::kDispatch;
      report.event = PhaseDone{stream, in.epoch(), in.batch(), phase};
      return report;
    }
    case v1::WorkerMessage::kBatchDone:
      report.event = ConvertBatchDone(stream, *message.mutable_batch_done(), report);
      return report;
    case v1::WorkerMessage::kEpochQuiesced:
      report.event = EpochQuiesced{stream, message.epoch_quiesced().epoch()};
      return report;
    case v1::WorkerMessage::kLeaving:
      report.event = WorkerLeaving{stream, message.leaving().reason()};
      return report;
    case v1::WorkerMessage::kDeviceRegionOpened:
      report.answer = {stream, ConvertState(message.device_region_opened()), {}};
      return report;
    case v1::WorkerMessage::kDeviceRegionsClosed: {
      const auto& closed = message.device_regions_closed().regions();
      report.answer = {stream, std::nullopt, {closed.begin(), closed.end()}};
      return report;
    }
    case v1::WorkerMessage::kFailure:
      report.event = ConvertFailure(stream, message.failure());
      return report;
    case v1::WorkerMessage::MESSAGE_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("control: a message of no known kind came");
}

v1::CoordinatorMessage ToProto(StreamMessage message) {
  v1::CoordinatorMessage out;
  std::visit([&out](auto& content) { Fill(content, out); }, message);
  return out;
}

}  // namespace epserve::coordinator
