#include "client/cpp/admin_client.h"

#include "client/cpp/channel.h"
#include "client/cpp/status.h"
#include "epserve/v1/admin.grpc.pb.h"

namespace epserve::client {

struct AdminClient::Core {
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Admin::Stub> stub;
};

namespace {

WorkerState FromMessage(const v1::WorkerStatus& message) {
  WorkerState worker;
  worker.worker_id = message.worker_id();
  worker.node = message.node();
  worker.pid = message.pid();
  worker.rank = message.rank();
  worker.state = message.state();
  worker.first_expert = message.first_expert();
  worker.num_experts = message.num_experts();
  worker.weight_bytes = message.weight_bytes();
  worker.heap_bytes = message.heap_bytes();
  worker.resident_bytes = message.resident_bytes();
  worker.load_fraction = message.load_fraction();
  worker.batches = message.batches();
  worker.expert_rows = message.expert_rows();
  worker.ms_since_heartbeat = message.ms_since_heartbeat();
  worker.backend = message.backend();
  return worker;
}

}  // namespace

AdminClient::AdminClient(const std::string& target, const ChannelSecurity& security,
                         absl::Duration max_reconnect_backoff)
    : core_(std::make_unique<Core>()) {
  core_->channel = CreateServiceChannel(target, security, max_reconnect_backoff);
  core_->stub = v1::Admin::NewStub(core_->channel);
}

AdminClient::~AdminClient() = default;

absl::StatusOr<ClusterState> AdminClient::GetClusterStatus(absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  v1::ClusterStatus message;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->GetClusterStatus(&context, {}, &message)));
  ClusterState cluster;
  cluster.cluster_id = message.cluster_id();
  cluster.version = message.version();
  cluster.model = message.model();
  cluster.state = message.state();
  cluster.epoch = message.epoch();
  cluster.expected_workers = message.expected_workers();
  for (const auto& worker : message.workers()) cluster.workers.push_back(FromMessage(worker));
  cluster.queued_requests = message.queued_requests();
  cluster.queue_capacity = message.queue_capacity();
  cluster.batches_in_flight = message.batches_in_flight();
  cluster.requests_ok = message.requests_ok();
  cluster.requests_failed = message.requests_failed();
  cluster.uptime_ms = message.uptime_ms();
  cluster.experts_without_worker = message.experts_without_worker();
  cluster.waiting_for = message.waiting_for();
  cluster.last_epoch_end = message.last_epoch_end();
  cluster.num_experts = message.num_experts();
  return cluster;
}

absl::StatusOr<std::vector<PlacementRange>> AdminClient::GetPlacement(absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  v1::Placement message;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->GetPlacement(&context, {}, &message)));
  std::vector<PlacementRange> ranges;
  for (const auto& range : message.ranges()) {
    ranges.push_back({range.rank(), range.worker_id(), range.first_expert(), range.num_experts()});
  }
  return ranges;
}

absl::StatusOr<std::vector<std::uint64_t>> AdminClient::GetExpertLoad(std::int64_t layer,
                                                                      absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  v1::GetExpertLoadRequest request;
  request.set_layer(layer);
  v1::ExpertLoad message;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->GetExpertLoad(&context, request, &message)));
  return std::vector<std::uint64_t>(message.rows().begin(), message.rows().end());
}

absl::Status AdminClient::DrainWorker(const std::string& worker_id, absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  v1::DrainWorkerRequest request;
  request.set_worker_id(worker_id);
  v1::DrainWorkerResponse response;
  return FromGrpcStatus(core_->stub->DrainWorker(&context, request, &response));
}

}  // namespace epserve::client
