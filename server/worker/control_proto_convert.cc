#include "server/worker/control_proto_convert.h"

#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::worker {
namespace {

// Ids and weights travel as little-endian bytes and are used as they lie.
static_assert(std::endian::native == std::endian::little);

absl::StatusOr<runtime::CountMatrix> ToCounts(const v1::CountMatrix& proto) {
  runtime::CountMatrix counts;
  while ((counts.num_ranks + 1) * (counts.num_ranks + 1) <= proto.rows_size()) ++counts.num_ranks;
  if (counts.num_ranks * counts.num_ranks != proto.rows_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("count matrix: ", proto.rows_size(), " entries are no square of ranks"));
  }
  counts.rows.assign(proto.rows().begin(), proto.rows().end());
  counts.rows_per_expert.assign(proto.rows_per_expert().begin(), proto.rows_per_expert().end());
  return counts;
}

absl::StatusOr<CoordinatorMessage> ToAssignment(const v1::Assignment& proto) {
  Assignment assignment;
  assignment.rank = proto.rank();
  auto& first = assignment.placement.first_expert;
  first.assign(proto.first_expert().begin(), proto.first_expert().end());
  if (proto.num_ranks() < 1 || proto.first_expert_size() != proto.num_ranks() + 1) {
    return absl::InvalidArgumentError(absl::StrCat("assignment: first_expert has ",
                                                   proto.first_expert_size(), " entries for ",
                                                   proto.num_ranks(), " ranks"));
  }
  if (proto.rank() < 0 || proto.rank() >= proto.num_ranks()) {
    return absl::InvalidArgumentError(
        absl::StrCat("assignment: rank ", proto.rank(), " is not in [0, ", proto.num_ranks(), ")"));
  }
  for (std::size_t i = 0; i + 1 < first.size(); ++i) {
    if (first[0] != 0 || first[i] > first[i + 1]) {
      return absl::InvalidArgumentError("assignment: first_expert does not ascend from 0");
    }
  }
  return assignment;
}

std::vector<RegionRows> ToRows(google::protobuf::RepeatedPtrField<v1::RegionRows>& proto) {
  std::vector<RegionRows> rows;
  rows.reserve(proto.size());
  for (v1::RegionRows& in : proto) {
    rows.push_back({in.region(), std::move(*in.mutable_label()), in.object_offset(), in.first_row(),
                    in.num_rows()});
  }
  return rows;
}

DeviceRegionInfo ToRegion(v1::DeviceRegion& proto) {
  return {proto.region(), std::move(*proto.mutable_label()), std::move(*proto.mutable_handle()),
          proto.device_id(), proto.size_bytes()};
}

CreateHeap ToCreateHeap(v1::CreateHeap& proto) {
  CreateHeap create{.epoch = proto.epoch(),
                    .row_arena = std::move(*proto.mutable_row_arena()),
                    .region_socket = std::move(*proto.mutable_region_socket()),
                    .region_secret = std::move(*proto.mutable_region_secret())};
  for (v1::DeviceRegion& region : *proto.mutable_device_regions()) {
    create.device_regions.push_back(ToRegion(region));
  }
  return create;
}

std::vector<DeviceRows> ToRows(const google::protobuf::RepeatedPtrField<v1::DeviceRows>& proto) {
  const auto place = [](bool is_there,
                        const v1::DevicePlace& in) -> std::optional<server::DevicePlace> {
    if (!is_there) return std::nullopt;
    return server::DevicePlace{in.region(), in.offset()};
  };
  std::vector<DeviceRows> rows;
  rows.reserve(proto.size());
  for (const v1::DeviceRows& in : proto) {
    rows.push_back({.first_row = in.first_row(),
                    .num_rows = in.num_rows(),
                    .request_row = in.request_row(),
                    .hidden = place(in.has_hidden(), in.hidden()),
                    .topk_ids = place(in.has_topk_ids(), in.topk_ids()),
                    .topk_weights = place(in.has_topk_weights(), in.topk_weights()),
                    .output = place(in.has_output(), in.output()),
                    .wide_ids = in.wide_ids()});
  }
  return rows;
}

absl::StatusOr<CoordinatorMessage> ToShard(v1::Shard& proto) {
  Shard shard;
  shard.epoch = proto.epoch();
  shard.batch = proto.batch();
  shard.slot = proto.slot();
  shard.layer = proto.layer();
  switch (proto.row_type()) {
    case v1::ROW_TYPE_FP32:
      shard.dtype = runtime::DataType::kFp32;
      break;
    case v1::ROW_TYPE_FP16:
      shard.dtype = runtime::DataType::kFp16;
      break;
    case v1::ROW_TYPE_BF16:
      shard.dtype = runtime::DataType::kBf16;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("shard: row_type ", static_cast<int>(proto.row_type()), " is unknown"));
  }
  shard.num_tokens = proto.num_tokens();
  shard.topk = proto.topk();
  shard.hidden = std::move(*proto.mutable_hidden());
  shard.routed = proto.routed();
  shard.topk_ids = std::move(*proto.mutable_topk_ids());
  shard.topk_weights = std::move(*proto.mutable_topk_weights());
  shard.in_arena = proto.in_arena();
  shard.row_block = proto.row_block();
  shard.first_row = proto.first_row();
  shard.shard_begin.assign(proto.shard_begin().begin(), proto.shard_begin().end());
  shard.rows_follow = proto.rows_follow();
  shard.sources = ToRows(*proto.mutable_sources());
  shard.targets = ToRows(*proto.mutable_targets());
  shard.device_rows = ToRows(proto.device_rows());
  shard.separate_triggers = proto.trigger() == v1::TRIGGER_SEPARATE;
  shard.device_counts = proto.device_counts();
  if (proto.has_counts()) {
    EPS_ASSIGN_OR_RETURN(shard.counts, ToCounts(proto.counts()));
  }
  return shard;
}

absl::StatusOr<CoordinatorMessage> ToOpenPeers(v1::OpenPeers& proto) {
  OpenPeers open{.epoch = proto.epoch()};
  open.handles.reserve(proto.handles_size());
  for (std::string& handle : *proto.mutable_handles()) open.handles.push_back(std::move(handle));
  return open;
}

absl::StatusOr<CoordinatorMessage> ToRejected(const v1::Rejected& proto) {
  const auto code = proto.code() > 0 && proto.code() <= 16
                        ? static_cast<absl::StatusCode>(proto.code())
                        : absl::StatusCode::kUnknown;
  return Rejected{absl::Status(code, proto.message())};
}

struct ProtoWriter {
  v1::WorkerMessage proto;

  void operator()(Hello&& m) {
    v1::Hello& out = *proto.mutable_hello();
    out.set_worker_id(std::move(m.worker_id));
    out.set_incarnation(std::move(m.incarnation));
    out.set_version(std::move(m.version));
    out.set_backend(std::move(m.backend));
    v1::ModelShape& shape = *out.mutable_model();
    shape.set_fingerprint(std::move(m.model.fingerprint));
    shape.set_architecture(std::move(m.model.architecture));
    shape.set_hidden(m.model.hidden);
    shape.set_intermediate(m.model.intermediate);
    shape.set_num_experts(m.model.num_experts);
    shape.set_topk(m.model.topk);
    shape.mutable_layers()->Assign(m.model.layers.begin(), m.model.layers.end());
    shape.set_has_router(m.model.has_router);
    out.set_last_epoch(m.last_epoch);
    out.set_held_rank(m.held_rank);
    out.set_held_num_ranks(m.held_num_ranks);
    out.set_node(std::move(m.node));
    out.set_pid(m.process.pid);
    out.set_process_home(std::move(m.process.home));
    out.set_process_start_ticks(m.process.start_ticks);
    out.set_max_batch_tokens(m.max_batch_tokens);
    out.set_cluster_id(std::move(m.cluster_id));
    out.set_num_slots(m.num_slots);
    out.set_device_counts(m.device_counts);
  }
  void operator()(Heartbeat&& m) {
    v1::Heartbeat& out = *proto.mutable_heartbeat();
    out.set_epoch(m.epoch);
    out.set_sent_monotonic_us(m.sent_monotonic_us);
    out.set_resident_bytes(m.resident_bytes);
  }
  void operator()(LoadProgress&& m) {
    proto.mutable_load_progress()->set_loaded_bytes(m.loaded_bytes);
    proto.mutable_load_progress()->set_total_bytes(m.total_bytes);
  }
  void operator()(Loaded&& m) {
    v1::Loaded& out = *proto.mutable_loaded();
    out.set_rank(m.rank);
    out.set_num_ranks(m.num_ranks);
    out.set_weight_bytes(m.weight_bytes);
    out.set_heap_bytes(m.heap_bytes);
  }
  void operator()(HeapCreated&& m) {
    proto.mutable_heap_created()->set_epoch(m.epoch);
    proto.mutable_heap_created()->set_handle(std::move(m.handle));
    proto.mutable_heap_created()->set_row_arena_mapped(m.row_arena_mapped);
    proto.mutable_heap_created()->set_regions_reachable(m.regions_reachable);
    proto.mutable_heap_created()->set_takes_shared_batches(m.takes_shared_batches);
    proto.mutable_heap_created()->set_handle_type(std::move(m.handle_type));
    for (const DeviceRegionState& state : m.refused_regions) {
      SetState(state, *proto.mutable_heap_created()->add_refused_regions());
    }
  }
  void operator()(PeersOpened&& m) {
    proto.mutable_peers_opened()->set_epoch(m.epoch);
    proto.mutable_peers_opened()->mutable_probe_output()->Assign(m.probe_output.begin(),
                                                                 m.probe_output.end());
  }
  void operator()(CountsReport&& m) {
    v1::Counts& out = *proto.mutable_counts();
    out.set_epoch(m.epoch);
    out.set_batch(m.batch);
    out.mutable_rows_to_rank()->Assign(m.counts.rows_to_rank.begin(), m.counts.rows_to_rank.end());
    out.mutable_rows_per_expert()->Assign(m.counts.rows_per_expert.begin(),
                                          m.counts.rows_per_expert.end());
  }
  void operator()(DispatchDone&& m) {
    v1::PhaseDone& out = *proto.mutable_phase_done();
    out.set_epoch(m.epoch);
    out.set_batch(m.batch);
    out.set_phase(v1::PHASE_DISPATCH);
  }
  void operator()(BatchDone&& m) {
    v1::BatchDone& out = *proto.mutable_batch_done();
    out.set_epoch(m.epoch);
    out.set_batch(m.batch);
    out.set_code(static_cast<int>(m.status.code()));
    if (!m.status.ok()) SetMessage(m.status, *out.mutable_message());
    out.set_output(std::move(m.output));
    v1::PhaseTimes& times = *out.mutable_times();
    times.set_assign_ns(m.times.assign_ns);
    times.set_counts_ns(m.times.counts_ns);
    times.set_dispatch_ns(m.times.engine.dispatch_ns);
    times.set_ffn_ns(m.times.engine.ffn_ns);
    times.set_combine_ns(m.times.engine.combine_ns);
    times.set_start_monotonic_ns(m.times.start_monotonic_ns);
    out.mutable_local_expert_rows()->Assign(m.local_expert_rows.begin(), m.local_expert_rows.end());
    for (const RegionFault& fault : m.region_faults) {
      v1::RegionFault& told = *out.add_region_faults();
      told.set_first_row(fault.first_row);
      told.set_code(static_cast<int>(fault.status.code()));
      SetMessage(fault.status, *told.mutable_message());
    }
  }
  void operator()(DeviceRegionOpened&& m) {
    SetState(m.state, *proto.mutable_device_region_opened());
  }
  void operator()(DeviceRegionsClosed&& m) {
    proto.mutable_device_regions_closed()->mutable_regions()->Assign(m.regions.begin(),
                                                                     m.regions.end());
  }
  void operator()(EpochQuiesced&& m) { proto.mutable_epoch_quiesced()->set_epoch(m.epoch); }
  void operator()(Leaving&& m) { proto.mutable_leaving()->set_reason(std::move(m.reason)); }
  void operator()(WorkerFailure&& m) {
    proto.mutable_failure()->set_code(static_cast<int>(m.status.code()));
    SetMessage(m.status, *proto.mutable_failure()->mutable_message());
  }

  static void SetState(const DeviceRegionState& state, v1::DeviceRegionOpened& out) {
    out.set_region(state.region);
    out.set_code(static_cast<int>(state.status.code()));
    if (!state.status.ok()) SetMessage(state.status, *out.mutable_message());
  }

  // Never empty, whatever the engine said: an empty message reads as success in some clients.
  static void SetMessage(const absl::Status& status, std::string& message) {
    message = std::string(status.message());
    if (message.empty()) message = absl::StatusCodeToString(status.code());
  }
};

}  // namespace

absl::StatusOr<CoordinatorMessage> FromProto(v1::CoordinatorMessage& message) {
  switch (message.message_case()) {
    case v1::CoordinatorMessage::kAssignment:
      return ToAssignment(message.assignment());
    case v1::CoordinatorMessage::kStandby:
      return Standby{message.standby().reason()};
    case v1::CoordinatorMessage::kCreateHeap:
      return ToCreateHeap(*message.mutable_create_heap());
    case v1::CoordinatorMessage::kOpenPeers:
      return ToOpenPeers(*message.mutable_open_peers());
    case v1::CoordinatorMessage::kEpochStarted:
      return EpochStarted{message.epoch_started().epoch()};
    case v1::CoordinatorMessage::kEpochEnded:
      return EpochEnded{message.epoch_ended().epoch(), message.epoch_ended().reason()};
    case v1::CoordinatorMessage::kLease:
      return LeaseGrant{message.lease().epoch(), message.lease().echo_monotonic_us(),
                        message.lease().duration_us()};
    case v1::CoordinatorMessage::kShard:
      return ToShard(*message.mutable_shard());
    case v1::CoordinatorMessage::kCountMatrix: {
      EPS_ASSIGN_OR_RETURN(runtime::CountMatrix counts, ToCounts(message.count_matrix()));
      return CountsKnown{message.count_matrix().epoch(), message.count_matrix().batch(),
                         std::move(counts)};
    }
    case v1::CoordinatorMessage::kDispatchTrigger:
      return DispatchTrigger{message.dispatch_trigger().epoch(),
                             message.dispatch_trigger().batch()};
    case v1::CoordinatorMessage::kCombineTrigger:
      return CombineTrigger{message.combine_trigger().epoch(), message.combine_trigger().batch()};
    case v1::CoordinatorMessage::kRejected:
      return ToRejected(message.rejected());
    case v1::CoordinatorMessage::kShutdown:
      return Shutdown{message.shutdown().reason()};
    case v1::CoordinatorMessage::kForgetRegions:
      return ForgetRegions{
          {message.forget_regions().regions().begin(), message.forget_regions().regions().end()}};
    case v1::CoordinatorMessage::kOpenDeviceRegion:
      return OpenDeviceRegion{ToRegion(*message.mutable_open_device_region()->mutable_region())};
    case v1::CoordinatorMessage::kCloseDeviceRegions: {
      const auto& regions = message.close_device_regions().regions();
      return CloseDeviceRegions{{regions.begin(), regions.end()}};
    }
    case v1::CoordinatorMessage::MESSAGE_NOT_SET:
      break;
  }
  return absl::UnimplementedError(
      "control stream: the coordinator sent a kind of message that this build does not know; "
      "run coordinator and workers of one version");
}

v1::WorkerMessage ToProto(WorkerMessage message) {
  ProtoWriter writer;
  std::visit([&writer](auto&& m) { writer(std::move(m)); }, std::move(message));
  return std::move(writer.proto);
}

}  // namespace epserve::worker
