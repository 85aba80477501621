// CUDA shared memory through a whole coordinator; workers that open it, or do not, are fakes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/coordinator_fixture.h"

namespace epserve::testing {
namespace {

using ::testing::HasSubstr;

class CoordinatorDeviceRegionTest : public CoordinatorFixture {
 protected:
  static constexpr std::int64_t kTokens = 6;

  CoordinatorDeviceRegionTest() { options_.allow_client_shm = true; }

  grpc::Status Register() {
    grpc::ClientContext context;
    inference::CudaSharedMemoryRegisterRequest request;
    request.set_name("gpu");
    request.set_raw_handle(std::string(64, 'h'));
    request.set_device_id(1);
    request.set_byte_size(4096);
    inference::CudaSharedMemoryRegisterResponse response;
    return front_door_->CudaSharedMemoryRegister(&context, request, &response);
  }
  grpc::Status Unregister() {
    grpc::ClientContext context;
    inference::CudaSharedMemoryUnregisterRequest request;
    request.set_name("gpu");
    inference::CudaSharedMemoryUnregisterResponse response;
    return front_door_->CudaSharedMemoryUnregister(&context, request, &response);
  }
  // A request with everything in the region.
  grpc::Status InferOnDevice(inference::ModelInferResponse* response) {
    inference::ModelInferRequest request;
    request.set_model_name(options_.model_name);
    (*request.mutable_parameters())["layer"].set_int64_param(1);
    std::int64_t offset = 0;
    const auto place = [&offset](std::int64_t size, auto* parameters) {
      (*parameters)["shared_memory_region"].set_string_param("gpu");
      (*parameters)["shared_memory_byte_size"].set_int64_param(size);
      (*parameters)["shared_memory_offset"].set_int64_param(offset);
      offset += size;
    };
    const auto add = [&](const char* name, const char* type, std::int64_t columns) {
      auto* input = request.add_inputs();
      input->set_name(name);
      input->set_datatype(type);
      input->add_shape(kTokens);
      input->add_shape(columns);
      place(kTokens * columns * 4, input->mutable_parameters());
    };
    add("hidden_states", "FP32", kHidden);
    add("topk_ids", "INT32", kTopk);
    add("topk_weights", "FP32", kTopk);
    auto* output = request.add_outputs();
    output->set_name("hidden_states");
    place(kTokens * kHidden * 4, output->mutable_parameters());
    grpc::ClientContext context;
    return front_door_->ModelInfer(&context, request, response);
  }
  // A worker that refuses every device region.
  FakeWorkerOptions Refusing(int index) {
    FakeWorkerOptions options = WorkerOptions(index);
    options.on_device_region = [](const v1::DeviceRegion&, v1::DeviceRegionOpened* opened) {
      opened->set_code(9);
      opened->set_message("open region: it sees no such GPU; show it one");
    };
    return options;
  }
};

TEST_F(CoordinatorDeviceRegionTest, EveryWorkerOpensTheRegionUsesItForItsRowsAndClosesIt) {
  // Kept by the workers, which outlive this function.
  struct Seen {
    std::mutex mutex;
    std::vector<v1::Shard> shards;
  };
  const auto seen = std::make_shared<Seen>();
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  for (int i = 0; i < kRanks; ++i) {
    FakeWorkerOptions options = WorkerOptions(i);
    options.on_shard = [seen](const v1::Shard& shard, v1::BatchDone*) {
      const std::lock_guard<std::mutex> lock(seen->mutex);
      if (shard.device_rows_size() > 0) seen->shards.push_back(shard);
      return true;
    };
    StartWorker(std::move(options));
  }
  ASSERT_TRUE(readiness_->WaitFor(true));
  const grpc::Status registered = Register();
  ASSERT_TRUE(registered.ok()) << registered.error_message();
  for (const auto& worker : workers_) {
    v1::CoordinatorMessage message;
    ASSERT_TRUE(worker->WaitFor(v1::CoordinatorMessage::kOpenDeviceRegion, &message));
    EXPECT_EQ(message.open_device_region().region().handle(), std::string(64, 'h'));
    EXPECT_EQ(message.open_device_region().region().device_id(), 1);
    EXPECT_EQ(message.open_device_region().region().size_bytes(), 4096u);
  }
  inference::ModelInferResponse response;
  const grpc::Status inferred = InferOnDevice(&response);
  ASSERT_TRUE(inferred.ok()) << inferred.error_message();
  ASSERT_EQ(response.raw_output_contents_size(), 1);
  EXPECT_EQ(response.raw_output_contents(0), "");
  std::vector<v1::Shard> shards;
  {
    const std::lock_guard<std::mutex> lock(seen->mutex);
    shards = seen->shards;
  }
  ASSERT_EQ(shards.size(), static_cast<std::size_t>(kRanks));
  for (const v1::Shard& shard : shards) {
    const v1::DeviceRows& rows = shard.device_rows(0);
    EXPECT_EQ(rows.num_rows(), kTokens / kRanks);
    EXPECT_EQ(rows.hidden().offset(), static_cast<std::uint64_t>(rows.request_row() * kHidden * 4));
    EXPECT_FALSE(shard.has_counts()) << "nobody but the workers knows the ids";
    EXPECT_EQ(shard.hidden(), "");
  }
  ASSERT_TRUE(Unregister().ok());
  for (const auto& worker : workers_) {
    EXPECT_TRUE(worker->WaitFor(v1::CoordinatorMessage::kCloseDeviceRegions));
  }
  EXPECT_EQ(InferOnDevice(&response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(CoordinatorDeviceRegionTest, OneWorkerThatCannotOpenItFailsTheRegistrationByName) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  StartWorker(WorkerOptions(0));
  StartWorker(Refusing(1));
  StartWorker(WorkerOptions(2));
  ASSERT_TRUE(readiness_->WaitFor(true));
  const grpc::Status registered = Register();
  EXPECT_EQ(registered.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(registered.error_message(), HasSubstr("region 'gpu' is not open at rank 1 (worker "));
  EXPECT_THAT(registered.error_message(), HasSubstr("show it one"));
  EXPECT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kCloseDeviceRegions));
  EXPECT_TRUE(workers_[2]->WaitFor(v1::CoordinatorMessage::kCloseDeviceRegions));
  // Batches are no longer held.
  EXPECT_TRUE(Infer(MakeCase(4, 1)).status.ok());
}

TEST_F(CoordinatorDeviceRegionTest, WorkerThatJoinsLaterGetsTheRegionsAndItsRefusalIsTheRequests) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  ASSERT_TRUE(Register().ok());
  FakeWorkerOptions replacement = Refusing(2);
  replacement.hello.set_incarnation("another process");
  replacement.hello.set_held_rank(-1);
  workers_[2]->Kill();
  ASSERT_TRUE(workers_[2]->WaitClosed());
  ASSERT_TRUE(readiness_->WaitFor(false));
  FakeWorker& joined = StartWorker(std::move(replacement));
  ASSERT_TRUE(readiness_->WaitFor(true));
  v1::CoordinatorMessage create;
  ASSERT_TRUE(joined.WaitFor(v1::CoordinatorMessage::kCreateHeap, &create));
  ASSERT_EQ(create.create_heap().device_regions_size(), 1);
  inference::ModelInferResponse response;
  const grpc::Status refused = InferOnDevice(&response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(refused.error_message(), HasSubstr("is not open at rank 2"));
  EXPECT_TRUE(Infer(MakeCase(4, 1)).status.ok()) << "requests elsewhere are none the worse";
}

}  // namespace
}  // namespace epserve::testing
