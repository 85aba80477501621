#include "tests/support/coordinator_fixture.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::testing {
namespace {

template <typename T>
void AddInput(const std::string& name, const std::string& datatype, std::vector<std::int64_t> shape,
              const std::vector<T>& values, inference::ModelInferRequest& request) {
  auto* input = request.add_inputs();
  input->set_name(name);
  input->set_datatype(datatype);
  for (std::int64_t dim : shape) input->add_shape(dim);
  request.add_raw_input_contents(reinterpret_cast<const char*>(values.data()),
                                 values.size() * sizeof(T));
}

}  // namespace

CoordinatorFixture::CoordinatorFixture() {
  options_.model_name = "tiny";
  options_.num_workers = kRanks;
  options_.listen = {"127.0.0.1:0"};
  options_.metrics_listen = "127.0.0.1:0";
  options_.max_batch_tokens = 12;
  options_.lease_ms = 5000;
  model_.fingerprint = "f00d";
  model_.architecture = "mixtral";
  model_.hidden = kHidden;
  model_.intermediate = 16;
  model_.num_experts = kExperts;
  model_.topk = kTopk;
  model_.layers = {1, 3};
  model_.has_router = true;
  pace_.epoch_pace_us = 0;
  pace_.probe_backoff_us = 10'000;
}

void CoordinatorFixture::StartCoordinator() {
  auto created = coordinator::Coordinator::Create(
      options_, model_, [this] { drained_.set_value(); }, pace_);
  ASSERT_TRUE(created.ok()) << created.status();
  coordinator_ = *std::move(created);
  channel_ = NewChannel();
  front_door_ = inference::GRPCInferenceService::NewStub(channel_);
  admin_ = v1::Admin::NewStub(channel_);
  readiness_ = std::make_unique<HealthWatch>(channel_, "readiness");
}

std::shared_ptr<grpc::Channel> CoordinatorFixture::NewChannel() const {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // A connection of its own.
  return grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", coordinator_->ports().front()),
                                   grpc::InsecureChannelCredentials(), arguments);
}

FakeWorkerOptions CoordinatorFixture::WorkerOptions(int index) const {
  FakeWorkerOptions worker;
  worker.hello.set_worker_id(absl::StrCat("w", index));
  worker.hello.set_incarnation(absl::StrCat("incarnation-", index));
  worker.hello.set_version(EPSERVE_VERSION);
  worker.hello.set_backend("host");
  worker.hello.set_device_counts(device_counts_);
  worker.hello.mutable_model()->set_fingerprint(model_.fingerprint);
  worker.hello.mutable_model()->set_hidden(model_.hidden);
  worker.hello.set_last_epoch(7);
  worker.hello.set_held_rank(index);
  worker.hello.set_held_num_ranks(kRanks);
  worker.hello.set_node("node-a");
  worker.hello.set_pid(1000 + index);
  worker.hello.set_max_batch_tokens(options_.max_batch_tokens);
  worker.hello.set_cluster_id(options_.cluster_id);
  worker.hello.set_num_slots(options_.num_slots);
  return worker;
}

FakeWorker& CoordinatorFixture::StartWorker(FakeWorkerOptions options) {
  workers_.push_back(std::make_unique<FakeWorker>(NewChannel(), std::move(options)));
  return *workers_.back();
}

void CoordinatorFixture::StartWorkers() {
  for (int index = 0; index < kRanks; ++index) StartWorker(WorkerOptions(index));
}

void CoordinatorFixture::StartReadyCluster() {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  StartWorkers();
  ASSERT_TRUE(readiness_->WaitFor(true));
}

InferCase CoordinatorFixture::MakeCase(std::int64_t num_tokens, std::uint32_t seed) const {
  InferCase made;
  made.num_tokens = num_tokens;
  std::uint32_t state = seed * 2654435761u + 1u;
  const auto next = [&state] { return state = state * 1664525u + 1013904223u, state >> 8; };
  for (std::int64_t i = 0; i < num_tokens * kHidden; ++i) {
    made.hidden.push_back(static_cast<float>(next() % 64));
  }
  for (std::int64_t i = 0; i < num_tokens * kTopk; ++i) {
    made.topk_ids.push_back(static_cast<std::int32_t>(next() % (kExperts + 1)) - 1);
    made.topk_weights.push_back(static_cast<float>(next() % 8) * 0.25f);
  }
  return made;
}

std::vector<float> CoordinatorFixture::Expected(const InferCase& request) const {
  if (request.routed) {
    return FakeOutput(request.hidden, request.topk_ids, request.topk_weights, request.num_tokens);
  }
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  for (std::int64_t place = 0; place < request.num_tokens * kTopk; ++place) {
    ids.push_back(static_cast<std::int32_t>(place % kTopk));
    weights.push_back(1.0f / static_cast<float>(kTopk));
  }
  return FakeOutput(request.hidden, ids, weights, request.num_tokens);
}

InferReply CoordinatorFixture::Infer(const InferCase& infer) {
  inference::ModelInferRequest request;
  request.set_model_name(options_.model_name);
  (*request.mutable_parameters())["layer"].set_int64_param(infer.layer);
  AddInput("hidden_states", "FP32", {infer.num_tokens, kHidden}, infer.hidden, request);
  if (infer.routed) {
    AddInput("topk_ids", "INT32", {infer.num_tokens, kTopk}, infer.topk_ids, request);
    AddInput("topk_weights", "FP32", {infer.num_tokens, kTopk}, infer.topk_weights, request);
  }
  grpc::ClientContext context;
  InferReply reply;
  reply.status = front_door_->ModelInfer(&context, request, &reply.response);
  if (reply.status.ok() && reply.response.raw_output_contents_size() == 1) {
    const std::string& bytes = reply.response.raw_output_contents(0);
    reply.output.resize(bytes.size() / sizeof(float));
    if (!bytes.empty()) std::memcpy(reply.output.data(), bytes.data(), bytes.size());
  }
  return reply;
}

std::future<InferReply> CoordinatorFixture::InferLater(const InferCase& request) {
  return std::async(std::launch::async, [this, request] { return Infer(request); });
}

}  // namespace epserve::testing
