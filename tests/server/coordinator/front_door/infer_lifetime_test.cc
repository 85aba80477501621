// The front door when callers go away, and when their tensors are in shared memory.
#include "server/coordinator/front_door/infer_service.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "tests/server/coordinator/front_door/infer_service_fixture.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;
using grpc::ClientContext;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

TEST_F(InferServiceTest, CancelledCallReachesTheSinkAndItsMemoryOutlivesTheCaller) {
  ClientContext context;
  grpc::Status status;
  std::thread caller([&] {
    ModelInferResponse response;
    status = stub_->ModelInfer(&context, ValidMessage(), &response);
  });
  auto request = sink_.Take();
  ASSERT_NE(request, nullptr);
  context.TryCancel();
  caller.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_THAT(sink_.WaitForCancelled(1), ElementsAre(request->id));
  EXPECT_THAT(sink_.WaitForAnswers(1), ElementsAre(StatusCode::kCancelled));
  // The batch runs on: its memory is still there, and its completion changes nothing.
  Echo(std::move(request));
  EXPECT_TRUE([this] {
    sink_.HandleBy(Echo);
    return Infer(ValidMessage()).ok();
  }());
  EXPECT_THAT(sink_.WaitForAnswers(2), ElementsAre(StatusCode::kCancelled, StatusCode::kOk));
}

// The sink has the rows in memory of its own, and keeps them there as long as they are wanted.
TEST_F(InferServiceTest, LentOutputIsTheReplyAndIsLetGoOnceItHasBeenTaken) {
  std::mutex mutex;  // Whoever waits for a reply is not seen to follow what made it.
  std::string expected;
  std::weak_ptr<const std::string> rows_of_last;
  const auto lend = [&](std::unique_ptr<PendingRequest> request) {
    const std::lock_guard lock(mutex);
    auto rows = std::make_shared<std::string>(request->request.output_bytes, 'r');
    rows->front() = 'f';
    rows->back() = 'l';
    expected = *rows;
    rows_of_last = rows;
    request->TakeOutput(*rows, rows);
    rows.reset();
    EXPECT_FALSE(rows_of_last.expired());
    request->Complete(Ok());
  };
  const auto let_go = [&] {
    const std::lock_guard lock(mutex);
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!rows_of_last.expired() && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return rows_of_last.expired();
  };
  sink_.HandleBy(lend);
  ModelInferResponse response;
  ASSERT_TRUE(Infer(ValidMessage(), &response).ok());
  {
    const std::lock_guard lock(mutex);
    EXPECT_EQ(response.raw_output_contents(0), expected);
  }
  EXPECT_TRUE(let_go());

  // A caller that goes before the answer: nobody wants it.
  sink_.HandleBy(nullptr);
  ClientContext context;
  std::thread caller([&] {
    ModelInferResponse ignored;
    EXPECT_FALSE(stub_->ModelInfer(&context, ValidMessage(), &ignored).ok());
  });
  auto request = sink_.Take();
  ASSERT_NE(request, nullptr);
  context.TryCancel();
  caller.join();
  ASSERT_EQ(sink_.WaitForCancelled(1).size(), 1u);
  lend(std::move(request));
  EXPECT_TRUE(let_go());
}

// Of calls that are to reach the server before it: on a busy machine that takes a while.
constexpr auto kDeadline = std::chrono::seconds(2);

TEST_F(InferServiceTest, DeadlineReachesTheSinkAndEndsTheCall) {
  ClientContext context;
  const auto before = PendingRequest::Clock::now();
  context.set_deadline(std::chrono::system_clock::now() + kDeadline);
  grpc::Status status;
  std::thread caller([&] {
    ModelInferResponse response;
    status = stub_->ModelInfer(&context, ValidMessage(), &response);
  });
  auto request = sink_.Take();
  ASSERT_NE(request, nullptr);
  EXPECT_GT(request->deadline, before);
  EXPECT_LT(request->deadline, before + kPatience);
  caller.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(sink_.WaitForCancelled(1), ElementsAre(request->id));
  // The client's own clock may cancel the call a moment before the server's sees the deadline.
  EXPECT_THAT(sink_.WaitForAnswers(1),
              Contains(testing::AnyOf(StatusCode::kDeadlineExceeded, StatusCode::kCancelled)));
}

TEST_F(InferServiceTest, CallThatExpiresBeforeItsMessageCameIsNoBadRequest) {
  grpc::GenericStub generic(channel_);
  ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kDeadline);
  grpc::CompletionQueue queue;
  // Its headers go out, and no message ever.
  const auto call =
      generic.PrepareCall(&context, "/inference.GRPCInferenceService/ModelInfer", &queue);
  call->StartCall(nullptr);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok));
  grpc::Status status;
  call->Finish(&status, &status);
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  // The client's own clock may cancel the call a moment before the server's sees the deadline.
  EXPECT_THAT(sink_.WaitForAnswers(1),
              ElementsAre(testing::AnyOf(StatusCode::kDeadlineExceeded, StatusCode::kCancelled)));
}

TEST_F(InferServiceTest, TimeoutParameterShortensTheDeadline) {
  PendingRequest::Clock::time_point none, with;
  PendingRequest::Clock::time_point arrival;
  sink_.HandleBy([&](std::unique_ptr<PendingRequest> request) {
    none = request->deadline;
    Echo(std::move(request));
  });
  ASSERT_TRUE(Infer(ValidMessage()).ok());
  ASSERT_EQ(sink_.WaitForAnswers(1).size(), 1u);
  EXPECT_EQ(none, PendingRequest::Clock::time_point::max());
  sink_.HandleBy([&](std::unique_ptr<PendingRequest> request) {
    with = request->deadline;
    arrival = request->arrival;
    Echo(std::move(request));
  });
  ModelInferRequest request = ValidMessage();
  (*request.mutable_parameters())["timeout"].set_int64_param(5'000'000);
  ASSERT_TRUE(Infer(request).ok());
  ASSERT_EQ(sink_.WaitForAnswers(2).size(), 2u);
  EXPECT_EQ(with, arrival + std::chrono::seconds(5));
}

TEST_F(InferServiceTest, CompletionRacingWithCancellationAnswersOnce) {
  constexpr int kCalls = 200;
  for (int i = 0; i < kCalls; ++i) {
    ClientContext context;
    std::thread caller([&] {
      ModelInferResponse response;
      const grpc::Status status = stub_->ModelInfer(&context, ValidMessage(), &response);
      EXPECT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::CANCELLED);
    });
    auto request = sink_.Take();
    ASSERT_NE(request, nullptr);
    std::thread canceller([&] { context.TryCancel(); });
    Echo(std::move(request));
    canceller.join();
    caller.join();
  }
  EXPECT_EQ(sink_.WaitForAnswers(kCalls).size(), static_cast<std::size_t>(kCalls));
}

TEST_F(InferServiceTest, TensorsInSharedMemoryGoBothWays) {
  sink_.HandleBy(Echo);
  ShmObject object(256);
  ModelInferRequest request = ValidMessage();
  object.Write(0, request.raw_input_contents(0));
  ASSERT_TRUE(Register("region", object, 256).ok());
  SetWindow(request.mutable_inputs(0)->mutable_parameters(), "region", 48, 0);
  request.mutable_raw_input_contents()->DeleteSubrange(0, 1);
  auto* output = request.add_outputs();
  output->set_name("hidden_states");
  SetWindow(output->mutable_parameters(), "region", 64, 128);
  ModelInferResponse response;
  const grpc::Status status = Infer(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(response.raw_output_contents(), ElementsAre("")) << "one entry, and it is empty";
  const auto& parameters = response.outputs(0).parameters();
  EXPECT_EQ(parameters.at("shared_memory_region").string_param(), "region");
  EXPECT_EQ(parameters.at("shared_memory_byte_size").int64_param(), 48);
  EXPECT_EQ(parameters.at("shared_memory_offset").int64_param(), 128);
  EXPECT_EQ(object.Read(128, 48), object.Read(0, 48));
  EXPECT_EQ(object.Read(176, 80), std::string(80, '\0')) << "nothing past the output is touched";
}

TEST_F(InferServiceTest, OutputRegionTruncatedInFlightIsAnErrorAndTheServerLives) {
  ShmObject object(4096);
  ASSERT_TRUE(Register("region", object, 4096).ok());
  sink_.HandleBy([&](std::unique_ptr<PendingRequest> request) {
    object.Truncate(0);
    Echo(std::move(request));
  });
  ModelInferRequest request = ValidMessage();
  auto* output = request.add_outputs();
  output->set_name("hidden_states");
  SetWindow(output->mutable_parameters(), "region", 48, 4000);
  const grpc::Status status = Infer(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("truncated"));
  sink_.HandleBy(Echo);
  EXPECT_TRUE(Infer(ValidMessage()).ok());
}

TEST_F(InferServiceTest, UnregisterAnswersAfterTheLastRequestThatUsesTheRegion) {
  ShmObject object(256);
  ASSERT_TRUE(Register("region", object, 256).ok());
  ModelInferRequest message = ValidMessage();
  auto* output = message.add_outputs();
  output->set_name("hidden_states");
  SetWindow(output->mutable_parameters(), "region", 48, 0);
  std::thread caller([&] { EXPECT_TRUE(Infer(message).ok()); });
  auto request = sink_.Take();
  ASSERT_NE(request, nullptr);

  std::atomic<bool> unregistered{false};
  std::thread unregisterer([&] {
    ClientContext context;
    inference::SystemSharedMemoryUnregisterRequest all;
    inference::SystemSharedMemoryUnregisterResponse response;
    EXPECT_TRUE(stub_->SystemSharedMemoryUnregister(&context, all, &response).ok());
    unregistered.store(true);
  });
  // The name goes at once; waiting for that shows that the call has arrived.
  while (regions_.Find("region").ok()) std::this_thread::yield();
  EXPECT_FALSE(unregistered.load());
  Echo(std::move(request));
  caller.join();
  unregisterer.join();
  EXPECT_EQ(object.Read(0, 48), ValidRequest().raw[0]);
}

TEST_F(InferServiceTest, RegionsAreListedAndRefusedTwice) {
  const ShmObject object(64);
  ASSERT_TRUE(Register("b", object, 64).ok());
  EXPECT_EQ(Register("b", object, 64).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  ClientContext all, unknown;
  inference::SystemSharedMemoryStatusResponse response;
  ASSERT_TRUE(stub_->SystemSharedMemoryStatus(&all, {}, &response).ok());
  ASSERT_EQ(response.regions_size(), 1);
  EXPECT_EQ(response.regions().at("b").byte_size(), 64u);
  EXPECT_EQ(response.regions().at("b").key(), "/" + object.key());
  inference::SystemSharedMemoryStatusRequest request;
  request.set_name("c");
  EXPECT_EQ(stub_->SystemSharedMemoryStatus(&unknown, request, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

class InferServiceWithoutShmTest : public InferServiceTest {
 protected:
  InferServiceWithoutShmTest() : InferServiceTest(ShmOptions()) {}
};

TEST_F(InferServiceWithoutShmTest, SharedMemoryIsUnimplementedNamingTheFlag) {
  const ShmObject object(64);
  ClientContext status_context, unregister_context, metadata_context, cuda[4];
  inference::SystemSharedMemoryStatusResponse status;
  inference::SystemSharedMemoryUnregisterResponse unregistered;
  inference::CudaSharedMemoryStatusResponse cuda_status;
  inference::CudaSharedMemoryRegisterResponse cuda_registered;
  inference::CudaSharedMemoryUnregisterRequest cuda_region;
  cuda_region.set_name("gpu");
  inference::CudaSharedMemoryUnregisterResponse cuda_unregistered;
  for (const grpc::Status& answer :
       {Register("a", object, 64), stub_->SystemSharedMemoryStatus(&status_context, {}, &status),
        stub_->SystemSharedMemoryUnregister(&unregister_context, {}, &unregistered),
        stub_->CudaSharedMemoryStatus(&cuda[0], {}, &cuda_status),
        stub_->CudaSharedMemoryRegister(&cuda[1], {}, &cuda_registered),
        stub_->CudaSharedMemoryUnregister(&cuda[2], cuda_region, &cuda_unregistered)}) {
    EXPECT_EQ(answer.error_code(), grpc::StatusCode::UNIMPLEMENTED);
    EXPECT_THAT(answer.error_message(), HasSubstr("--allow-client-shm"));
  }
  // perf_analyzer clears both kinds before it uses either.
  EXPECT_TRUE(stub_->CudaSharedMemoryUnregister(&cuda[3], {}, &cuda_unregistered).ok());
  inference::ServerMetadataResponse metadata;
  ASSERT_TRUE(stub_->ServerMetadata(&metadata_context, {}, &metadata).ok());
  EXPECT_THAT(metadata.extensions(), Not(Contains("system_shared_memory")));
}

}  // namespace
}  // namespace epserve::coordinator
