// CUDA shared memory at the front door; the workers are played by a fake.
#include <gmock/gmock.h>

#include "tests/server/coordinator/front_door/infer_service_fixture.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using testing::HasSubstr;

class CudaRegionTest : public InferServiceTest {
 protected:
  static inference::CudaSharedMemoryRegisterRequest Region(const std::string& name,
                                                           std::uint64_t size = 1 << 16) {
    inference::CudaSharedMemoryRegisterRequest request;
    request.set_name(name);
    request.set_raw_handle(std::string(64, 'h'));
    request.set_device_id(1);
    request.set_byte_size(size);
    return request;
  }
  grpc::Status RegisterCuda(const inference::CudaSharedMemoryRegisterRequest& request) {
    grpc::ClientContext context;
    inference::CudaSharedMemoryRegisterResponse response;
    return stub_->CudaSharedMemoryRegister(&context, request, &response);
  }
  grpc::Status UnregisterCuda(const std::string& name) {
    grpc::ClientContext context;
    inference::CudaSharedMemoryUnregisterRequest request;
    request.set_name(name);
    inference::CudaSharedMemoryUnregisterResponse response;
    return stub_->CudaSharedMemoryUnregister(&context, request, &response);
  }
  grpc::Status UnregisterSystem(const std::string& name) {
    grpc::ClientContext context;
    inference::SystemSharedMemoryUnregisterRequest request;
    request.set_name(name);
    inference::SystemSharedMemoryUnregisterResponse response;
    return stub_->SystemSharedMemoryUnregister(&context, request, &response);
  }
  inference::CudaSharedMemoryStatusResponse List() {
    grpc::ClientContext context;
    inference::CudaSharedMemoryStatusResponse response;
    EXPECT_TRUE(stub_->CudaSharedMemoryStatus(&context, {}, &response).ok());
    return response;
  }
  // Every tensor of a valid request, and its output, in the region.
  static ModelInferRequest AllIn(const std::string& region) {
    ModelInferRequest request = ValidMessage();
    std::int64_t offset = 0;
    for (int i = 0; i < request.inputs_size(); ++i) {
      const auto size = static_cast<std::int64_t>(request.raw_input_contents(i).size());
      SetWindow(request.mutable_inputs(i)->mutable_parameters(), region, size, offset);
      offset += size;
    }
    const auto size = static_cast<std::int64_t>(request.raw_input_contents(0).size());
    auto* output = request.add_outputs();
    output->set_name("hidden_states");
    SetWindow(output->mutable_parameters(), region, size, offset);
    request.clear_raw_input_contents();
    return request;
  }
  template <typename Condition>
  static bool Await(const Condition& condition) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (!condition()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
};

TEST_F(CudaRegionTest, RegisteredRegionIsListedAndItsRequestsGoToTheWorkersUnread) {
  ASSERT_TRUE(RegisterCuda(Region("gpu")).ok());
  const auto listed = List();
  ASSERT_EQ(listed.regions_size(), 1);
  EXPECT_EQ(listed.regions().at("gpu").device_id(), 1u);
  EXPECT_EQ(listed.regions().at("gpu").byte_size(), 1u << 16);
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    const ValidatedRequest& validated = request->request;
    EXPECT_TRUE(validated.routed);
    EXPECT_TRUE(validated.topk_ids.empty());
    EXPECT_TRUE(validated.topk_weights.empty());
    EXPECT_TRUE(validated.hidden.empty());
    for (const RegionWindow* window :
         {&validated.source, &validated.output, &validated.ids_source, &validated.weights_source}) {
      ASSERT_NE(window->region, nullptr);
      EXPECT_EQ(window->region->info().handle, std::string(64, 'h'));
    }
    EXPECT_LT(validated.ids_source.offset_bytes, validated.weights_source.offset_bytes);
    request->Complete(Ok());
  });
  inference::ModelInferResponse response;
  const grpc::Status status = Infer(AllIn("gpu"), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.raw_output_contents_size(), 1);
  EXPECT_EQ(response.raw_output_contents(0), "");
}

TEST_F(CudaRegionTest, MalformedRegistrationIsRefusedBeforeAnyWorkerIsAsked) {
  auto short_handle = Region("a");
  short_handle.set_raw_handle(std::string(63, 'h'));
  auto long_handle = Region("a");
  long_handle.set_raw_handle(std::string(65, 'h'));
  auto nameless = Region("");
  auto no_device = Region("a");
  no_device.set_device_id(-1);
  for (const auto& request : {short_handle, long_handle, nameless, no_device, Region("a", 0)}) {
    const grpc::Status status = RegisterCuda(request);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr("register:"));
  }
  const grpc::Status huge = RegisterCuda(Region("a", std::uint64_t{1} << 63));
  EXPECT_EQ(huge.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(devices_.num_opened(), 0);
  EXPECT_EQ(List().regions_size(), 0);
}

TEST_F(CudaRegionTest, RegionThatAWorkerRefusesIsNotRegisteredAndItsNameIsFree) {
  devices_.AnswerWith(absl::FailedPreconditionError("rank 1 has no such GPU"));
  const grpc::Status refused = RegisterCuda(Region("gpu"));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(refused.error_message(), HasSubstr("rank 1"));
  EXPECT_EQ(List().regions_size(), 0);
  EXPECT_EQ(Infer(AllIn("gpu")).error_code(), grpc::StatusCode::NOT_FOUND);
  devices_.AnswerWith(absl::OkStatus());
  EXPECT_TRUE(RegisterCuda(Region("gpu")).ok());
}

TEST_F(CudaRegionTest, NobodyFindsARegionBeforeTheWorkersHaveItButItsNameIsTaken) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) { request->Complete(Ok()); });
  devices_.Keep();
  std::thread registering([this] { EXPECT_TRUE(RegisterCuda(Region("gpu")).ok()); });
  ASSERT_TRUE(Await([this] { return devices_.holds(); }));
  EXPECT_EQ(Infer(AllIn("gpu")).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(List().regions_size(), 0);
  EXPECT_EQ(RegisterCuda(Region("gpu")).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  devices_.Answer(absl::OkStatus());
  registering.join();
  EXPECT_EQ(List().regions_size(), 1);
}

TEST_F(CudaRegionTest, RegionUnregisteredWhileItIsBeingRegisteredIsClosedAgain) {
  devices_.Keep();
  std::thread registering(
      [this] { EXPECT_EQ(RegisterCuda(Region("gpu")).error_code(), grpc::StatusCode::ABORTED); });
  ASSERT_TRUE(Await([this] { return devices_.holds(); }));
  std::thread unregistering([this] { EXPECT_TRUE(UnregisterCuda("gpu").ok()); });
  ASSERT_TRUE(Await([this] {
    return regions_.ReserveCuda("gpu", std::string(64, 'x'), 0, 1).ok();
  })) << "the name is free";
  devices_.Answer(absl::OkStatus());
  registering.join();
  unregistering.join();
  EXPECT_EQ(devices_.closed().size(), 1u);
}

TEST_F(CudaRegionTest, UnregisterWaitsForTheLastRequestAndThenForTheWorkers) {
  ASSERT_TRUE(RegisterCuda(Region("gpu")).ok());
  std::thread inferring([this] { EXPECT_TRUE(Infer(AllIn("gpu")).ok()); });
  std::unique_ptr<PendingRequest> request = sink_.Take();
  ASSERT_NE(request, nullptr);
  const std::uint64_t id = request->request.source.region->info().id;
  std::atomic<bool> unregistered = false;
  std::thread unregistering([&] {
    EXPECT_TRUE(UnregisterCuda("gpu").ok());
    unregistered = true;
  });
  ASSERT_TRUE(Await([this] { return List().regions_size() == 0; }));
  EXPECT_FALSE(unregistered);
  EXPECT_TRUE(devices_.closed().empty()) << "a request still uses it";
  request->Complete(Ok());
  request = nullptr;
  inferring.join();
  unregistering.join();
  EXPECT_THAT(devices_.closed(), testing::ElementsAre(id));
}

TEST_F(CudaRegionTest, BothKindsShareOneNamespaceAndEachIsUnregisteredAsWhatItIs) {
  const ShmObject object(64);
  ASSERT_TRUE(Register("system", object, 64).ok());
  ASSERT_TRUE(RegisterCuda(Region("cuda")).ok());
  EXPECT_EQ(RegisterCuda(Region("system")).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(Register("cuda", object, 64).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  const grpc::Status wrong = UnregisterSystem("cuda");
  EXPECT_EQ(wrong.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(wrong.error_message(), HasSubstr("CudaSharedMemoryUnregister"));
  EXPECT_EQ(UnregisterCuda("system").error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(UnregisterCuda("unknown").ok());
  EXPECT_TRUE(UnregisterSystem("").ok());
  EXPECT_EQ(List().regions_size(), 1) << "only the system ones are gone";
  EXPECT_TRUE(UnregisterCuda("").ok());
  EXPECT_EQ(List().regions_size(), 0);
  EXPECT_EQ(devices_.closed().size(), 1u);
}

TEST_F(CudaRegionTest, UnregisterThatCameTooLateGoesToTheWorkersAgainThoughTheNameIsGone) {
  ASSERT_TRUE(RegisterCuda(Region("gpu")).ok());
  devices_.CloseWith(absl::DeadlineExceededError("unregister: too late; retry"));
  for (const int closings : {1, 2}) {
    EXPECT_EQ(UnregisterCuda("gpu").error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
    EXPECT_EQ(devices_.num_closings(), closings);
    EXPECT_EQ(List().regions_size(), 0);
  }
  devices_.CloseWith(absl::OkStatus());
  EXPECT_TRUE(UnregisterCuda("gpu").ok());
  EXPECT_EQ(devices_.closed().size(), 1u);
}

TEST_F(CudaRegionTest, WindowPastTheRegionOrOutputThatShiftsTheInputIsRefused) {
  ASSERT_TRUE(RegisterCuda(Region("gpu")).ok());
  ASSERT_TRUE(RegisterCuda(Region("alias")).ok()) << "the same handle by another name";
  ModelInferRequest past = AllIn("gpu");
  (*past.mutable_inputs(1)->mutable_parameters())["shared_memory_offset"].set_int64_param(1 << 16);
  EXPECT_EQ(Infer(past).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  ModelInferRequest shifted = AllIn("gpu");
  auto& window = *shifted.mutable_outputs(0)->mutable_parameters();
  window["shared_memory_region"].set_string_param("alias");
  window["shared_memory_offset"].set_int64_param(4);
  const grpc::Status torn = Infer(shifted);
  EXPECT_EQ(torn.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(torn.error_message(), HasSubstr("overlaps"));
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) { request->Complete(Ok()); });
  window["shared_memory_offset"].set_int64_param(0);
  EXPECT_TRUE(Infer(shifted).ok()) << "in place";
}

}  // namespace
}  // namespace epserve::coordinator
