#include "server/coordinator/admin_service.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <utility>

#include "epserve/v1/admin.grpc.pb.h"
#include "runtime/base/log.h"
#include "server/common/grpc_status.h"

namespace epserve::coordinator {
namespace {

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
  out->set_state(WorkerStateName(in.worker));
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
  out->set_requests_ok(in.cluster.requests_ok);
  out->set_requests_failed(in.cluster.requests_failed);
  out->set_uptime_ms(in.uptime_ms);
  out->set_experts_without_worker(in.cluster.experts_without_worker);
  out->set_num_experts(in.cluster.num_experts);
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

class AdminService final : public v1::Admin::CallbackService {
 public:
  AdminService(Host* host, AdminInfo info) : host_(host), info_(std::move(info)) {}

  grpc::ServerUnaryReactor* GetClusterStatus(grpc::CallbackServerContext* context,
                                             const v1::GetClusterStatusRequest*,
                                             v1::ClusterStatus* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    host_->QueryCluster([this, reactor, response](const absl::StatusOr<ClusterView>& view) {
      if (view.ok()) FillCluster(*view, info_, response);
      reactor->Finish(server::ToGrpcStatus(view.status()));
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* GetPlacement(grpc::CallbackServerContext* context,
                                         const v1::GetPlacementRequest*,
                                         v1::Placement* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    host_->QueryCluster([reactor, response](const absl::StatusOr<ClusterView>& view) {
      if (view.ok()) FillPlacement(*view, response);
      reactor->Finish(server::ToGrpcStatus(view.status()));
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* GetExpertLoad(grpc::CallbackServerContext* context,
                                          const v1::GetExpertLoadRequest* request,
                                          v1::ExpertLoad* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    host_->QueryExpertLoad(
        request->layer(),
        [reactor, response](const absl::StatusOr<std::vector<std::uint64_t>>& rows) {
          if (rows.ok()) response->mutable_rows()->Assign(rows->begin(), rows->end());
          reactor->Finish(server::ToGrpcStatus(rows.status()));
        });
    return reactor;
  }

  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context,
                                        const v1::DrainWorkerRequest* request,
                                        v1::DrainWorkerResponse*) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    runtime::LogInfo("drain_worker_asked",
                     {{"worker", request->worker_id()}, {"peer", context->peer()}});
    if (request->worker_id().empty()) {
      reactor->Finish(server::ToGrpcStatus(absl::InvalidArgumentError(
          "drain: worker_id is empty; name a worker, see epserve status")));
      return reactor;
    }
    host_->DrainWorker(request->worker_id(), [reactor](const absl::Status& status) {
      reactor->Finish(server::ToGrpcStatus(status));
    });
    return reactor;
  }

 private:
  Host* const host_;
  const AdminInfo info_;
};

}  // namespace

std::unique_ptr<grpc::Service> CreateAdminService(Host* host, AdminInfo info) {
  return std::make_unique<AdminService>(host, std::move(info));
}

}  // namespace epserve::coordinator
