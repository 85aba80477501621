#include "server/coordinator/admin_service.h"

#include <memory>
#include <utility>
#include <vector>

#include "epserve/v1/admin.pb.h"
#include "runtime/base/log.h"
#include "server/rpc/unary_call.h"

namespace epserve::coordinator {
namespace {

using server::UnaryCall;
using server::UnaryHandler;

const char* ClusterStateName(ClusterState state) {
  switch (state) {
    case ClusterState::kWaiting:
      return "waiting";
    case ClusterState::kForming:
      return "forming";
    case ClusterState::kProbing:
      return "probing";
    case ClusterState::kServing:
      return "serving";
    case ClusterState::kDraining:
      return "draining";
  }
  return "waiting";
}

// Of the weights, while loading; 1 after. A standby has loaded nothing.
double LoadFraction(const WorkerSnapshot& worker) {
  if (worker.state == WorkerState::kStandby) return 0.0;
  if (worker.state != WorkerState::kLoading) return 1.0;
  if (worker.total_bytes == 0) return 0.0;
  return static_cast<double>(worker.loaded_bytes) / static_cast<double>(worker.total_bytes);
}

void FillWorker(const WorkerView& in, v1::WorkerStatus* out) {
  out->set_worker_id(in.worker.worker_id);
  out->set_node(in.node);
  out->set_pid(in.pid);
  out->set_rank(in.worker.rank);
  out->set_state(WorkerStateName(in.worker.state, in.worker.draining));
  out->set_first_expert(in.worker.first_expert);
  out->set_num_experts(in.worker.num_experts);
  out->set_weight_bytes(in.worker.weight_bytes);
  out->set_heap_bytes(in.worker.heap_bytes);
  out->set_resident_bytes(in.worker.resident_bytes);
  out->set_load_fraction(LoadFraction(in.worker));
  out->set_batches(in.worker.batches);
  out->set_expert_rows(in.expert_rows);
  out->set_ms_since_heartbeat(in.ms_since_heartbeat);
  out->set_backend(in.backend);
}

void FillCluster(const ClusterView& in, const AdminInfo& info, v1::ClusterStatus* out) {
  out->set_cluster_id(info.cluster_id);
  out->set_version(info.version);
  out->set_model(info.model_name);
  out->set_state(ClusterStateName(in.cluster.state));
  out->set_epoch(in.cluster.epoch);
  out->set_expected_workers(in.cluster.expected_workers);
  for (const WorkerView& worker : in.workers) FillWorker(worker, out->add_workers());
  out->set_queued_requests(in.cluster.queued_requests);
  out->set_queue_capacity(in.cluster.queue_capacity);
  out->set_batches_in_flight(in.cluster.batches_in_flight);
  out->set_requests_ok(in.requests.ok);
  out->set_requests_failed(in.requests.failed);
  out->set_uptime_ms(in.uptime_ms);
  out->set_experts_without_worker(in.cluster.experts_without_worker);
  out->set_num_experts(in.cluster.num_experts);
  out->set_waiting_for(in.cluster.waiting_for);
  out->set_last_epoch_end(in.cluster.last_epoch_end);
}

void FillPlacement(const ClusterView& in, v1::Placement* out) {
  out->set_epoch(in.cluster.epoch);
  for (int rank = 0; rank < in.placement.num_ranks(); ++rank) {
    v1::Placement::Range* range = out->add_ranges();
    range->set_rank(rank);
    range->set_first_expert(in.placement.first_expert[static_cast<std::size_t>(rank)]);
    range->set_num_experts(in.placement.num_local_experts(rank));
    for (const WorkerView& worker : in.workers) {
      if (worker.worker.rank == rank) range->set_worker_id(worker.worker.worker_id);
    }
  }
}

}  // namespace

void AddAdminService(Host* host, AdminInfo admin_info, server::RpcServer* server) {
  // The host's callbacks must be copyable, so each holds its call through a shared pointer.
  const auto info = std::make_shared<const AdminInfo>(std::move(admin_info));
  server->Handle("/epserve.v1.Admin/GetClusterStatus",
                 UnaryHandler([host, info](UnaryCall call, const grpc::ByteBuffer&) {
                   auto held = std::make_shared<UnaryCall>(std::move(call));
                   host->QueryCluster([info, held](const absl::StatusOr<ClusterView>& view) {
                     if (!view.ok()) return held->Fail(view.status());
                     v1::ClusterStatus response;
                     FillCluster(*view, *info, &response);
                     held->Reply(response);
                   });
                 }));
  server->Handle("/epserve.v1.Admin/GetPlacement",
                 UnaryHandler([host](UnaryCall call, const grpc::ByteBuffer&) {
                   auto held = std::make_shared<UnaryCall>(std::move(call));
                   host->QueryCluster([held](const absl::StatusOr<ClusterView>& view) {
                     if (!view.ok()) return held->Fail(view.status());
                     v1::Placement response;
                     FillPlacement(*view, &response);
                     held->Reply(response);
                   });
                 }));
  server->Handle("/epserve.v1.Admin/GetExpertLoad",
                 UnaryHandler([host](UnaryCall call, const grpc::ByteBuffer& bytes) {
                   v1::GetExpertLoadRequest request;
                   const absl::Status parsed = server::ParseMessage(bytes, &request);
                   if (!parsed.ok()) return call.Fail(parsed);
                   auto held = std::make_shared<UnaryCall>(std::move(call));
                   host->QueryExpertLoad(
                       request.layer(),
                       [held](const absl::StatusOr<std::vector<std::uint64_t>>& rows) {
                         if (!rows.ok()) return held->Fail(rows.status());
                         v1::ExpertLoad response;
                         response.mutable_rows()->Assign(rows->begin(), rows->end());
                         held->Reply(response);
                       });
                 }));
  server->Handle("/epserve.v1.Admin/DrainWorker",
                 UnaryHandler([host](UnaryCall call, const grpc::ByteBuffer& bytes) {
                   v1::DrainWorkerRequest request;
                   const absl::Status parsed = server::ParseMessage(bytes, &request);
                   if (!parsed.ok()) return call.Fail(parsed);
                   runtime::LogInfo("drain_worker_asked",
                                    {{"worker", request.worker_id()}, {"peer", call.peer()}});
                   if (request.worker_id().empty()) {
                     return call.Fail(absl::InvalidArgumentError(
                         "drain: worker_id is empty; name a worker, see epserve status"));
                   }
                   auto held = std::make_shared<UnaryCall>(std::move(call));
                   host->DrainWorker(request.worker_id(), [held](const absl::Status& status) {
                     if (!status.ok()) return held->Fail(status);
                     held->Reply(v1::DrainWorkerResponse());
                   });
                 }));
}

}  // namespace epserve::coordinator
