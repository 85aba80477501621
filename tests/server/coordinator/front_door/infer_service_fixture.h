// The front door over real gRPC on loopback, with a fake coordinator behind it.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_FIXTURE_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "inference/grpc_service.grpc.pb.h"
#include "server/coordinator/front_door/infer_service.h"
#include "server/coordinator/front_door/server_limits.h"
#include "server/rpc/rpc_server.h"
#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {

inline constexpr int kMaxMessageBytes = 1 << 20;
inline constexpr std::int64_t kMaxHeldBytes = 4 << 20;
inline constexpr auto kPatience = std::chrono::seconds(60);  // Only a failing test waits that long.

// Hands every request to a handler, or keeps it for the test to take.
class FakeSink final : public RequestSink {
 public:
  using Handler = std::function<void(std::unique_ptr<PendingRequest>)>;

  void HandleBy(Handler on_submit) {
    const std::lock_guard lock(mutex_);
    on_submit_ = std::move(on_submit);
  }
  void Submit(std::unique_ptr<PendingRequest> request) override {
    std::unique_lock lock(mutex_);
    if (on_submit_) {
      const Handler handler = on_submit_;
      lock.unlock();
      return handler(std::move(request));
    }
    submitted_.push_back(std::move(request));
    changed_.notify_all();
  }
  void Cancel(std::uint64_t id) override {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(id);
    changed_.notify_all();
  }
  bool ready() const override { return is_ready.load(); }
  void OnAnswered(absl::StatusCode code, std::chrono::nanoseconds server_time) override {
    EXPECT_GE(server_time.count(), 0);
    const std::lock_guard lock(mutex_);
    answers_.push_back(code);
    changed_.notify_all();
  }

  std::unique_ptr<PendingRequest> Take() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kPatience, [this] { return !submitted_.empty(); })) return nullptr;
    auto request = std::move(submitted_.back());
    submitted_.pop_back();
    return request;
  }
  std::size_t num_waiting() {
    const std::lock_guard lock(mutex_);
    return submitted_.size();
  }
  std::vector<std::uint64_t> WaitForCancelled(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return cancelled_.size() >= count; });
    return cancelled_;
  }
  std::vector<absl::StatusCode> WaitForAnswers(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return answers_.size() >= count; });
    return answers_;
  }

  std::atomic<bool> is_ready{true};

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Handler on_submit_;
  std::vector<std::unique_ptr<PendingRequest>> submitted_;
  std::vector<std::uint64_t> cancelled_;
  std::vector<absl::StatusCode> answers_;
};

// Answers with what a test says, or keeps what is asked for.
class FakeDeviceHost final : public DeviceRegionHost {
 public:
  void OpenDeviceRegion(std::shared_ptr<const ShmRegion> region, Done done) override {
    absl::Status answer;
    {
      const std::lock_guard lock(mutex_);
      ++opened_;
      if (keeps_) {
        region_ = std::move(region);
        done_ = std::move(done);
        return;
      }
      answer = answer_;
    }
    done(answer);
  }
  void CloseDeviceRegions(std::vector<std::uint64_t> regions, Done done) override {
    absl::Status answer;
    {
      const std::lock_guard lock(mutex_);
      ++closings_;
      closed_.insert(closed_.end(), regions.begin(), regions.end());
      answer = closing_answer_;
    }
    done(answer);
  }

  void AnswerWith(absl::Status answer) {
    const std::lock_guard lock(mutex_);
    answer_ = std::move(answer);
  }
  // A caller may have its reply while the answer before this one is still being looked at.
  void CloseWith(absl::Status answer) {
    const std::lock_guard lock(mutex_);
    closing_answer_ = std::move(answer);
  }
  void Keep() {
    const std::lock_guard lock(mutex_);
    keeps_ = true;
  }
  // What was kept is answered.
  void Answer(const absl::Status& status) {
    Done done;
    std::shared_ptr<const ShmRegion> region;
    {
      const std::lock_guard lock(mutex_);
      done = std::exchange(done_, nullptr);
      region = std::exchange(region_, nullptr);
    }
    done(status);
  }
  bool holds() {
    const std::lock_guard lock(mutex_);
    return region_ != nullptr;
  }
  int num_opened() {
    const std::lock_guard lock(mutex_);
    return opened_;
  }
  int num_closings() {
    const std::lock_guard lock(mutex_);
    return closings_;
  }
  std::vector<std::uint64_t> closed() {
    const std::lock_guard lock(mutex_);
    return closed_;
  }

 private:
  std::mutex mutex_;
  absl::Status answer_;
  absl::Status closing_answer_;
  bool keeps_ = false;
  std::shared_ptr<const ShmRegion> region_;
  Done done_;
  int opened_ = 0;
  int closings_ = 0;
  std::vector<std::uint64_t> closed_;
};

inline Completion Ok() {
  Completion completion;
  completion.times = {1, 2, /*counts_ns=*/3000, 4, 5, 6, 77};
  return completion;
}

// Answers with the hidden states themselves, from and to wherever the request says.
inline void Echo(std::unique_ptr<PendingRequest> request) {
  const ValidatedRequest& validated = request->request;
  std::string rows(validated.hidden.begin(), validated.hidden.end());
  absl::Status status;
  if (const RegionWindow& source = validated.source; source.region != nullptr) {
    rows.resize(validated.output_bytes);
    status = source.region->Read(source.offset_bytes, std::span<char>(rows));
  }
  ASSERT_EQ(rows.size(), validated.output_bytes);
  if (const RegionWindow& output = validated.output; output.region != nullptr) {
    status.Update(output.region->Write(output.offset_bytes, rows));
  } else {
    std::copy(rows.begin(), rows.end(), request->MutableOutput().begin());
  }
  Completion completion = Ok();
  completion.status = status;
  request->Complete(completion);
}

inline ShmOptions Allowed() {
  ShmOptions options;
  options.allowed = true;
  return options;
}

class InferServiceTest : public testing::Test {
 protected:
  explicit InferServiceTest(ShmOptions shm = Allowed(), std::int64_t max_held = kMaxHeldBytes)
      : regions_(std::move(shm)) {
    FrontDoorOptions options;
    options.model = TestModel();
    options.max_held_bytes = max_held;
    service_ = std::make_unique<InferService>(options, &regions_, &sink_, &devices_);
    service_->AddTo(&server_);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    ApplyServerLimits(kMaxMessageBytes, builder);
    EXPECT_TRUE(server_.Start(&builder, /*num_threads=*/1));
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                                   grpc::InsecureChannelCredentials());
    stub_ = inference::GRPCInferenceService::NewStub(channel_);
  }

  static inference::ModelInferRequest ValidMessage() {
    const TestRequest valid = ValidRequest();
    inference::ModelInferRequest message;
    message.set_model_name(valid.model_name);
    message.set_id("request-1");
    for (const TestInput& input : valid.inputs) {
      auto* tensor = message.add_inputs();
      tensor->set_name(input.name);
      tensor->set_datatype(input.datatype);
      for (const std::int64_t size : input.shape) tensor->add_shape(size);
    }
    for (const std::string& raw : valid.raw) message.add_raw_input_contents(raw);
    return message;
  }

  grpc::Status Infer(const inference::ModelInferRequest& request,
                     inference::ModelInferResponse* response = nullptr) {
    grpc::ClientContext context;
    inference::ModelInferResponse ignored;
    return stub_->ModelInfer(&context, request, response == nullptr ? &ignored : response);
  }

  grpc::Status Register(const std::string& name, const ShmObject& object, std::uint64_t size) {
    inference::SystemSharedMemoryRegisterRequest request;
    request.set_name(name);
    request.set_key("/" + object.key());
    request.set_byte_size(size);
    inference::SystemSharedMemoryRegisterResponse response;
    grpc::ClientContext context;
    return stub_->SystemSharedMemoryRegister(&context, request, &response);
  }

  FakeSink sink_;
  FakeDeviceHost devices_;
  ShmRegistry regions_;
  std::unique_ptr<InferService> service_;
  server::RpcServer server_;  // stops before the service goes
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub_;
};

inline void SetWindow(google::protobuf::Map<std::string, inference::InferParameter>* parameters,
                      const std::string& region, std::int64_t size, std::int64_t offset) {
  (*parameters)["shared_memory_region"].set_string_param(region);
  (*parameters)["shared_memory_byte_size"].set_int64_param(size);
  (*parameters)["shared_memory_offset"].set_int64_param(offset);
}

}  // namespace epserve::coordinator

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_FIXTURE_H_
