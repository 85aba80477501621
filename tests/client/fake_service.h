// An in-process GRPCInferenceService and Admin for tests of the client: what ModelInfer does is a
// function of the test's.
#ifndef EPSERVE_TESTS_CLIENT_FAKE_SERVICE_H_
#define EPSERVE_TESTS_CLIENT_FAKE_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <climits>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "epserve/v1/admin.grpc.pb.h"
#include "inference/grpc_service.grpc.pb.h"

namespace epserve::client {

class FakeService : public inference::GRPCInferenceService::Service, public v1::Admin::Service {
 public:
  using Handler = std::function<grpc::Status(
      grpc::ServerContext&, const inference::ModelInferRequest&, inference::ModelInferResponse&)>;

  explicit FakeService(std::int64_t hidden = 2, std::int64_t topk = 1, std::int64_t experts = 2)
      : hidden_(hidden), topk_(topk), experts_(experts) {
    Start(kAnyPort);
  }
  ~FakeService() override { Stop(); }

  static constexpr char kAnyPort[] = "127.0.0.1:0";

  void Start(const std::string& address) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    builder.SetMaxReceiveMessageSize(INT_MAX);
    builder.RegisterService(static_cast<inference::GRPCInferenceService::Service*>(this));
    builder.RegisterService(static_cast<v1::Admin::Service*>(this));
    server_ = builder.BuildAndStart();
    target_ = absl::StrCat("127.0.0.1:", port);
  }
  void Stop() {
    if (server_ == nullptr) return;
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
    server_ = nullptr;
  }

  const std::string& target() const { return target_; }
  int calls() const { return calls_.load(); }
  // Holds for the calls that come after it.
  void set_handler(Handler handler) {
    const std::lock_guard<std::mutex> lock(mutex_);
    handler_ = std::move(handler);
  }
  void set_ready(bool ready) { ready_ = ready; }

  // Answers with the request's hidden_states.
  static grpc::Status Echo(grpc::ServerContext&, const inference::ModelInferRequest& request,
                           inference::ModelInferResponse& response) {
    response.set_id(request.id());
    auto* output = response.add_outputs();
    output->set_name("hidden_states");
    output->set_datatype(request.inputs(0).datatype());
    *output->mutable_shape() = request.inputs(0).shape();
    response.add_raw_output_contents(request.raw_input_contents(0));
    (*response.mutable_parameters())["epserve_ffn_us"].set_int64_param(7);
    return grpc::Status::OK;
  }

  // Echoes all requests but the one of this id, which fails with `status`.
  static Handler EchoBut(std::string id, grpc::Status status) {
    return [id = std::move(id), status = std::move(status)](grpc::ServerContext& context,
                                                            const auto& request, auto& response) {
      return request.id() == id ? status : Echo(context, request, response);
    };
  }

  grpc::Status ModelInfer(grpc::ServerContext* context, const inference::ModelInferRequest* request,
                          inference::ModelInferResponse* response) override {
    ++calls_;
    return Handle(*context, *request, *response);
  }
  // Each message as a ModelInfer call of its own; errors in their place, with their code.
  grpc::Status ModelStreamInfer(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<inference::ModelStreamInferResponse, inference::ModelInferRequest>*
          stream) override {
    inference::ModelInferRequest request;
    while (stream->Read(&request)) {
      ++calls_;
      inference::ModelStreamInferResponse response;
      const grpc::Status status = Handle(*context, request, *response.mutable_infer_response());
      if (status.error_code() == grpc::StatusCode::ABORTED) return status;  // ends the stream
      if (!status.ok()) {
        response.set_error_message(status.error_message());
        (*response.mutable_infer_response()->mutable_parameters())["epserve_error_code"]
            .set_int64_param(status.error_code());
      }
      if (!stream->Write(response)) break;
    }
    return grpc::Status::OK;
  }
  grpc::Status ServerReady(grpc::ServerContext*, const inference::ServerReadyRequest*,
                           inference::ServerReadyResponse* response) override {
    response->set_ready(ready_);
    return grpc::Status::OK;
  }
  grpc::Status RepositoryIndex(grpc::ServerContext*, const inference::RepositoryIndexRequest*,
                               inference::RepositoryIndexResponse* response) override {
    response->add_models()->set_name("fake");
    return grpc::Status::OK;
  }
  grpc::Status ModelMetadata(grpc::ServerContext*, const inference::ModelMetadataRequest* request,
                             inference::ModelMetadataResponse* response) override {
    response->set_name(request->name());
    response->add_versions("1");
    const auto add = [&](const char* name, std::int64_t size) {
      auto* input = response->add_inputs();
      input->set_name(name);
      input->add_shape(-1);
      input->add_shape(size);
    };
    add("hidden_states", hidden_);
    add("topk_ids", topk_);
    add("topk_weights", topk_);
    return grpc::Status::OK;
  }
  grpc::Status GetClusterStatus(grpc::ServerContext*, const v1::GetClusterStatusRequest*,
                                v1::ClusterStatus* response) override {
    response->set_model("fake");
    response->set_state("serving");
    response->set_epoch(42);
    response->set_num_experts(experts_);
    response->set_expected_workers(1);
    auto* worker = response->add_workers();
    worker->set_worker_id("worker-0");
    worker->set_state("serving");
    worker->set_num_experts(experts_);
    return grpc::Status::OK;
  }
  grpc::Status DrainWorker(grpc::ServerContext*, const v1::DrainWorkerRequest* request,
                           v1::DrainWorkerResponse*) override {
    if (request->worker_id() == "worker-0") return grpc::Status::OK;
    return {grpc::StatusCode::NOT_FOUND, "drain: no worker " + request->worker_id()};
  }

 protected:
  // For services that add to this one: theirs to start at the end of their constructor, and to stop
  // at the beginning of their destructor.
  struct NotStarted {};
  explicit FakeService(NotStarted) : hidden_(2), topk_(1), experts_(2) {}

 private:
  grpc::Status Handle(grpc::ServerContext& context, const inference::ModelInferRequest& request,
                      inference::ModelInferResponse& response) {
    std::unique_lock<std::mutex> lock(mutex_);
    const Handler handler = handler_;
    lock.unlock();
    return handler(context, request, response);
  }

  const std::int64_t hidden_;
  const std::int64_t topk_;
  const std::int64_t experts_;
  std::atomic<int> calls_{0};
  std::atomic<bool> ready_{true};
  std::mutex mutex_;
  Handler handler_ = Echo;  // Guarded by mutex_: set by the test, read by gRPC's threads.
  std::string target_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace epserve::client

#endif  // EPSERVE_TESTS_CLIENT_FAKE_SERVICE_H_
