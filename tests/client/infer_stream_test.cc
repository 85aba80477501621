// Streams of requests, against a fake service.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

using testing::HasSubstr;

class InferStreamTest : public testing::Test {
 protected:
  InferStreamTest() : client_(ClientOptions{.target = service_.target()}) {}

  static InferRequest Numbered(int number) {
    InferRequest request;
    request.model = "fake";
    request.id = absl::StrCat("r", number);
    request.hidden_states =
        MakeTensor(ElementType::kF32, {1, 2}, {static_cast<double>(number), -1.0});
    return request;
  }

  FakeService service_;
  InferenceClient client_;
};

TEST_F(InferStreamTest, ResultsComeInOrderWhileMoreAreSent) {
  constexpr int kRequests = 500;
  const auto stream = client_.OpenStream();
  std::thread sender([&] {
    for (int i = 0; i < kRequests; ++i) ASSERT_TRUE(stream->Send(Numbered(i)).ok());
  });
  for (int i = 0; i < kRequests; ++i) {
    absl::StatusOr<InferResult> result = stream->Receive();
    // The sender may be behind.
    while (absl::IsFailedPrecondition(result.status())) result = stream->Receive();
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->id, absl::StrCat("r", i));
    EXPECT_EQ(ToDoubles(result->hidden_states)[0], i);
  }
  sender.join();
}

TEST_F(InferStreamTest, FailedRequestIsAnErrorInItsPlaceAndTheStreamGoesOn) {
  service_.set_handler(
      FakeService::EchoBut("r1", {grpc::StatusCode::RESOURCE_EXHAUSTED, "queue full"}));
  const auto stream = client_.OpenStream();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(stream->Send(Numbered(i)).ok());
  EXPECT_TRUE(stream->Receive().ok());
  const absl::Status failed = stream->Receive().status();
  EXPECT_EQ(failed.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(std::string(failed.message()), "queue full");
  EXPECT_EQ(stream->Receive()->id, "r2");
}

TEST_F(InferStreamTest, FailedRequestSaysWhenToSendItAgainOnAStreamAndInACallOfItsOwn) {
  service_.set_handler([](grpc::ServerContext& context, const auto& request, auto& response) {
    if (request.id() == "r1") return grpc::Status(grpc::StatusCode::UNAVAILABLE, "away");
    (*response.mutable_parameters())["epserve_retry_pushback_ms"].set_int64_param(70);
    context.AddTrailingMetadata("grpc-retry-pushback-ms", "80");
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
  });
  const auto stream = client_.OpenStream();
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(stream->Send(Numbered(i)).ok());
  const absl::Status full = stream->Receive().status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(RetryPushback(full), absl::Milliseconds(70));
  EXPECT_EQ(RetryPushback(stream->Receive().status()), std::nullopt);
  EXPECT_EQ(RetryPushback(client_.Infer(Numbered(2)).status()), absl::Milliseconds(80));
  std::promise<absl::Status> ended;
  client_.InferAsync(Numbered(3),
                     [&](absl::StatusOr<InferResult> result) { ended.set_value(result.status()); });
  EXPECT_EQ(RetryPushback(ended.get_future().get()), absl::Milliseconds(80));
}

TEST_F(InferStreamTest, StreamThatBreaksSaysWhyForAllThatItOwes) {
  service_.set_handler([](grpc::ServerContext&, const auto&, auto&) {
    return grpc::Status(grpc::StatusCode::ABORTED, "the end");
  });
  const auto stream = client_.OpenStream();
  ASSERT_TRUE(stream->Send(Numbered(0)).ok());
  for (int i = 0; i < 2; ++i) {
    const absl::Status status = stream->Receive().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
    EXPECT_THAT(std::string(status.message()), HasSubstr("the end"));
  }
  EXPECT_EQ(stream->Send(Numbered(1)).code(), absl::StatusCode::kUnavailable);
}

TEST_F(InferStreamTest, ReceiveWithoutARequestAndWrongTensorsAreRefused) {
  const auto stream = client_.OpenStream();
  EXPECT_EQ(stream->Receive().status().code(), absl::StatusCode::kFailedPrecondition);
  InferRequest wrong = Numbered(0);
  wrong.hidden_states.bytes = std::string(7, 'x');
  EXPECT_EQ(stream->Send(wrong).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(stream->Send(Numbered(0)).ok());
  EXPECT_TRUE(stream->Receive().ok());
}

TEST_F(InferStreamTest, CancelEndsAReceiveThatWaits) {
  std::atomic<bool> arrived{false};
  service_.set_handler([&](grpc::ServerContext& context, const auto&, auto&) {
    arrived = true;
    while (!context.IsCancelled()) std::this_thread::yield();
    return grpc::Status(grpc::StatusCode::ABORTED, "cancelled");
  });
  const auto stream = client_.OpenStream();
  ASSERT_TRUE(stream->Send(Numbered(0)).ok());
  std::thread canceller([&] {
    while (!arrived) std::this_thread::yield();
    stream->Cancel();
  });
  EXPECT_EQ(stream->Receive().status().code(), absl::StatusCode::kCancelled);
  canceller.join();
}

TEST_F(InferStreamTest, TimeoutEndsTheStream) {
  service_.set_handler([](grpc::ServerContext& context, const auto&, auto&) {
    while (!context.IsCancelled()) std::this_thread::yield();
    return grpc::Status(grpc::StatusCode::ABORTED, "late");
  });
  const auto stream = client_.OpenStream({.timeout = absl::Milliseconds(1500)});
  ASSERT_TRUE(stream->Send(Numbered(0)).ok());
  EXPECT_EQ(stream->Receive().status().code(), absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace epserve::client
