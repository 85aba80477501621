#include "client/cpp/client.h"

#include <atomic>
#include <future>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/cpp/admin_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

using ::testing::HasSubstr;

InferRequest Request() {
  InferRequest request;
  request.model = "fake";
  request.id = "r1";
  request.hidden_states = MakeTensor(ElementType::kF32, {1, 2}, {1, 2});
  request.topk_ids = MakeTensor(ElementType::kI32, {1, 1}, {1});
  request.topk_weights = MakeTensor(ElementType::kF32, {1, 1}, {0.5});
  return request;
}

// Fails `failures` times with `code` and a pushback, if one is given, then echoes.
FakeService::Handler FailFirst(int failures, grpc::StatusCode code, std::string pushback) {
  auto left = std::make_shared<std::atomic<int>>(failures);
  return [=](grpc::ServerContext& context, const inference::ModelInferRequest& request,
             inference::ModelInferResponse& response) {
    if (left->fetch_sub(1) <= 0) return FakeService::Echo(context, request, response);
    if (!pushback.empty()) context.AddTrailingMetadata("grpc-retry-pushback-ms", pushback);
    return grpc::Status(code, "not now");
  };
}

class ClientTest : public ::testing::Test {
 protected:
  InferenceClient Client(int max_attempts = 1) {
    return InferenceClient({.target = service_.target(),
                            .retry = {.max_attempts = max_attempts,
                                      .initial_backoff = absl::Milliseconds(1),
                                      .max_backoff = absl::Milliseconds(4)}});
  }
  // The result of InferAsync, waited for.
  static absl::StatusOr<InferResult> Await(InferenceClient& client, const InferRequest& request) {
    std::promise<absl::StatusOr<InferResult>> promise;
    const auto call = client.InferAsync(
        request, [&](absl::StatusOr<InferResult> result) { promise.set_value(std::move(result)); });
    return promise.get_future().get();
  }
  FakeService service_;
};

TEST_F(ClientTest, InferSendsTensorsLayerAndMetadataAndReadsTheAnswer) {
  std::mutex mutex;
  inference::ModelInferRequest seen;
  std::string tag;
  service_.set_handler([&](grpc::ServerContext& context,
                           const inference::ModelInferRequest& request,
                           inference::ModelInferResponse& response) {
    std::lock_guard<std::mutex> lock(mutex);
    seen = request;
    const auto found = context.client_metadata().find("x-tag");
    if (found != context.client_metadata().end())
      tag.assign(found->second.data(), found->second.size());
    return FakeService::Echo(context, request, response);
  });
  InferenceClient client = Client();
  InferRequest request = Request();
  request.layer = 3;
  request.metadata = {{"x-tag", "blue"}};
  const auto result = client.Infer(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->id, "r1");
  EXPECT_EQ(result->hidden_states.bytes, request.hidden_states.bytes);
  EXPECT_EQ(result->parameters.at("epserve_ffn_us"), 7);
  EXPECT_EQ(result->attempts, 1);
  std::lock_guard<std::mutex> lock(mutex);
  EXPECT_EQ(tag, "blue");
  EXPECT_EQ(seen.parameters().at("layer").int64_param(), 3);
  ASSERT_EQ(seen.inputs_size(), 3);
  EXPECT_EQ(seen.inputs(0).datatype(), "FP32");
  EXPECT_EQ(seen.inputs(1).name(), "topk_ids");
  EXPECT_EQ(seen.inputs(1).datatype(), "INT32");
  EXPECT_EQ(seen.raw_input_contents(2), std::string_view(request.topk_weights->bytes));
}

TEST_F(ClientTest, RequestThatCannotBeRightIsRefusedWithoutACall) {
  InferenceClient client = Client();
  InferRequest no_model = Request();
  no_model.model.clear();
  InferRequest half = Request();
  half.topk_weights.reset();
  InferRequest short_bytes = Request();
  short_bytes.hidden_states.bytes = std::string(7, 'x');
  for (const InferRequest& request : {no_model, half, short_bytes}) {
    EXPECT_EQ(client.Infer(request).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(Await(client, request).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(service_.calls(), 0);
}

TEST_F(ClientTest, ServerThatIsBackIsFoundWithinTheBackoff) {
  InferenceClient client = Client();
  ASSERT_TRUE(client.Infer(Request()).ok());
  service_.Stop();
  const absl::Time gone = absl::Now();
  while (absl::Now() - gone < absl::Milliseconds(700)) {
    EXPECT_EQ(client.Infer(Request()).status().code(), absl::StatusCode::kUnavailable);
  }
  service_.Start(service_.target());
  const absl::Time back = absl::Now();
  // Attempts are 1.2 s apart at most; gRPC alone might look at the one that succeeds 5 s later.
  while (!client.Infer(Request()).ok()) ASSERT_LT(absl::Now() - back, absl::Seconds(3.5));
}

TEST_F(ClientTest, AsynchronousCallsFindAServerThatIsBackWithinTheBackoff) {
  InferenceClient client = Client();
  ASSERT_TRUE(Await(client, Request()).ok());
  service_.Stop();
  const absl::Time gone = absl::Now();
  while (absl::Now() - gone < absl::Milliseconds(700)) {
    EXPECT_EQ(Await(client, Request()).status().code(), absl::StatusCode::kUnavailable);
    absl::SleepFor(absl::Milliseconds(20));
  }
  service_.Start(service_.target());
  const absl::Time back = absl::Now();
  while (!Await(client, Request()).ok()) {
    ASSERT_LT(absl::Now() - back, absl::Seconds(3.5));
    absl::SleepFor(absl::Milliseconds(20));
  }
}

TEST_F(ClientTest, UnavailableIsNotRetriedUnlessOptedInto) {
  service_.set_handler(FailFirst(1, grpc::StatusCode::UNAVAILABLE, ""));
  InferenceClient client = Client();
  const auto result = client.Infer(Request());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(result.status().message(), "not now");
  EXPECT_EQ(service_.calls(), 1);
}

TEST_F(ClientTest, UnavailableIsRetriedUpToTheBound) {
  InferenceClient client = Client(/*max_attempts=*/3);
  service_.set_handler(FailFirst(2, grpc::StatusCode::UNAVAILABLE, ""));
  const auto result = client.Infer(Request());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->attempts, 3);
  service_.set_handler(FailFirst(3, grpc::StatusCode::UNAVAILABLE, ""));
  EXPECT_EQ(client.Infer(Request()).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(service_.calls(), 6);
}

TEST_F(ClientTest, AsyncRetriesAsSyncDoes) {
  InferenceClient client = Client(/*max_attempts=*/3);
  service_.set_handler(FailFirst(2, grpc::StatusCode::UNAVAILABLE, ""));
  const auto result = Await(client, Request());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->attempts, 3);
  EXPECT_EQ(result->hidden_states.bytes, Request().hidden_states.bytes);
  service_.set_handler(FailFirst(3, grpc::StatusCode::UNAVAILABLE, ""));
  EXPECT_EQ(Await(client, Request()).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ClientTest, PushbackIsWaitedFor) {
  InferenceClient client = Client(/*max_attempts=*/2);
  for (const bool async : {false, true}) {
    service_.set_handler(FailFirst(1, grpc::StatusCode::RESOURCE_EXHAUSTED, "60"));
    const absl::Time started = absl::Now();
    const auto result = async ? Await(client, Request()) : client.Infer(Request());
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->attempts, 2);
    EXPECT_GE(absl::Now() - started, absl::Milliseconds(60));
  }
}

TEST_F(ClientTest, FullQueueWithoutPushbackOrWithANegativeOneIsNotRetried) {
  InferenceClient client = Client(/*max_attempts=*/5);
  for (const char* pushback : {"", "-1"}) {
    service_.set_handler(FailFirst(1, grpc::StatusCode::RESOURCE_EXHAUSTED, pushback));
    EXPECT_EQ(client.Infer(Request()).status().code(), absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(service_.calls(), 2);
}

TEST_F(ClientTest, WaitPastTheDeadlineIsNotBegun) {
  InferenceClient client = Client(/*max_attempts=*/2);
  service_.set_handler(FailFirst(1, grpc::StatusCode::RESOURCE_EXHAUSTED, "3600000"));
  InferRequest request = Request();
  request.timeout = absl::Seconds(20);
  EXPECT_EQ(client.Infer(request).status().code(), absl::StatusCode::kResourceExhausted);
}

// A handler that waits until its call is cancelled. Holds for several calls, each of which keeps
// what it needs alive.
class Gate {
 public:
  FakeService::Handler Handler() {
    return
        [state = state_](grpc::ServerContext& context, const inference::ModelInferRequest& request,
                         inference::ModelInferResponse& response) {
          ++state->entered;
          while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
          ++state->cancelled;
          return FakeService::Echo(context, request, response);
        };
  }
  int entered() const { return state_->entered; }
  void WaitForEntered() const {
    while (state_->entered == 0) absl::SleepFor(absl::Milliseconds(1));
  }
  void WaitForCancelled() const {
    while (state_->cancelled == 0) absl::SleepFor(absl::Milliseconds(1));
  }

 private:
  struct State {
    std::atomic<int> entered{0};
    std::atomic<int> cancelled{0};
  };
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

TEST_F(ClientTest, DeadlineEndsTheCallAndReachesTheServer) {
  Gate gate;
  service_.set_handler(gate.Handler());
  InferenceClient client = Client();
  InferRequest request = Request();
  // On a busy machine a short deadline may pass before the call has reached the server.
  for (request.timeout = absl::Milliseconds(50); gate.entered() == 0; request.timeout *= 2) {
    EXPECT_EQ(client.Infer(request).status().code(), absl::StatusCode::kDeadlineExceeded);
  }
  gate.WaitForCancelled();
}

TEST_F(ClientTest, CancelEndsTheCallAndReachesTheServer) {
  Gate gate;
  service_.set_handler(gate.Handler());
  InferenceClient client = Client(/*max_attempts=*/5);
  std::promise<absl::StatusOr<InferResult>> promise;
  const auto call = client.InferAsync(
      Request(), [&](absl::StatusOr<InferResult> result) { promise.set_value(std::move(result)); });
  gate.WaitForEntered();
  call->Cancel();
  EXPECT_EQ(promise.get_future().get().status().code(), absl::StatusCode::kCancelled);
  gate.WaitForCancelled();
  EXPECT_EQ(service_.calls(), 1);
}

TEST_F(ClientTest, CancelEndsTheWaitBeforeARetry) {
  absl::Notification failed;
  service_.set_handler([&](grpc::ServerContext& context, const inference::ModelInferRequest&,
                           inference::ModelInferResponse&) {
    context.AddTrailingMetadata("grpc-retry-pushback-ms", "10000");
    failed.Notify();
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
  });
  InferenceClient client = Client(/*max_attempts=*/2);
  InferRequest request = Request();
  request.timeout = absl::Seconds(60);
  std::promise<absl::StatusOr<InferResult>> promise;
  const absl::Time started = absl::Now();
  const auto call = client.InferAsync(
      request, [&](absl::StatusOr<InferResult> result) { promise.set_value(std::move(result)); });
  failed.WaitForNotification();
  // Either the answer is still on its way, or the wait has begun: both must end.
  call->Cancel();
  const auto result = promise.get_future().get();
  EXPECT_THAT(result.status().code(),
              ::testing::AnyOf(absl::StatusCode::kCancelled, absl::StatusCode::kResourceExhausted));
  EXPECT_LT(absl::Now() - started, absl::Seconds(5));
  EXPECT_EQ(service_.calls(), 1);
}

TEST_F(ClientTest, MemoryOfARequestMayBeWrittenAgainInItsCallback) {
  service_.set_handler(FakeService::Echo);
  InferenceClient client = Client();
  InferRequest request = Request();
  request.topk_ids.reset();
  request.topk_weights.reset();
  request.hidden_states.shape = {8192, 2};
  request.hidden_states.bytes = std::string(8192 * 2 * 4, 'x');
  const char* const place = request.hidden_states.bytes.data();
  std::promise<bool> same;
  const auto call = client.InferAsync(request, [&](const absl::StatusOr<InferResult>& result) {
    EXPECT_TRUE(result.ok()) << result.status();
    TensorBytes& bytes = request.hidden_states.bytes;
    TensorMemory again(bytes.size(), std::move(bytes));
    same.set_value(again.data() == place);
  });
  EXPECT_TRUE(same.get_future().get());
}

TEST_F(ClientTest, CallOutlivesItsClient) {
  std::promise<absl::StatusOr<InferResult>> promise;
  {
    InferenceClient client = Client();
    client.InferAsync(Request(), [&](absl::StatusOr<InferResult> result) {
      promise.set_value(std::move(result));
    });
  }
  EXPECT_TRUE(promise.get_future().get().ok());
}

TEST_F(ClientTest, AnswerThatDoesNotFitTheRequestIsInternal) {
  InferenceClient client = Client();
  using Response = inference::ModelInferResponse;
  const std::function<void(Response&)> spoilers[] = {
      [](Response& r) { r.clear_outputs(); },
      [](Response& r) { r.clear_raw_output_contents(); },
      [](Response& r) { r.mutable_outputs(0)->set_name("other"); },
      [](Response& r) { r.mutable_outputs(0)->set_datatype("BF16"); },
      [](Response& r) { r.mutable_outputs(0)->set_shape(0, 2); },
      [](Response& r) { r.mutable_raw_output_contents(0)->pop_back(); }};
  for (const auto& spoil : spoilers) {
    service_.set_handler([&](grpc::ServerContext& context,
                             const inference::ModelInferRequest& request, Response& response) {
      FakeService::Echo(context, request, response).ok();
      spoil(response);
      return grpc::Status::OK;
    });
    EXPECT_EQ(client.Infer(Request()).status().code(), absl::StatusCode::kInternal);
  }
}

TEST_F(ClientTest, MessagesBeyondGrpcsDefaultLimitPass) {
  InferenceClient client = Client();
  InferRequest request = Request();
  request.hidden_states.shape = {1 << 20, 2};
  request.hidden_states.bytes = std::string(std::size_t{8} << 20, 'x');
  request.topk_ids.reset();
  request.topk_weights.reset();
  const auto result = client.Infer(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->hidden_states.bytes.size(), std::size_t{8} << 20);
}

TEST_F(ClientTest, LargeResultOutlivesItsClientInPiecesAndInOne) {
  InferRequest request = Request();
  request.hidden_states.shape = {1 << 20, 2};
  std::string text(std::size_t{8} << 20, 'x');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 31 >> 8);
  request.hidden_states.bytes = text;
  request.topk_ids.reset();
  request.topk_weights.reset();
  TensorBytes bytes;
  {
    InferenceClient client = Client();
    auto result = client.Infer(request);
    ASSERT_TRUE(result.ok()) << result.status();
    bytes = std::move(result->hidden_states.bytes);
  }
  std::string joined;
  int num_pieces = 0;
  bytes.ForEachPiece([&](std::string_view piece) {
    joined += piece;
    ++num_pieces;
  });
  EXPECT_GT(num_pieces, 1);
  EXPECT_TRUE(joined == text);
  EXPECT_TRUE(std::string_view(bytes) == text);
}

TEST_F(ClientTest, ReadinessIsWaitedForAndReported) {
  InferenceClient client = Client();
  service_.set_ready(false);
  const absl::Status not_ready = client.WaitUntilReady(absl::Seconds(2));
  EXPECT_EQ(not_ready.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(not_ready.message()), HasSubstr("not every worker"));
  std::thread later([&] {
    absl::SleepFor(absl::Milliseconds(60));
    service_.set_ready(true);
  });
  EXPECT_TRUE(client.WaitUntilReady(absl::Seconds(20)).ok());
  later.join();
}

TEST_F(ClientTest, ServiceThatIsNotThereIsUnavailable) {
  InferenceClient client({.target = "127.0.0.1:1"});
  EXPECT_EQ(client.Infer(Request()).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(client.WaitUntilReady(absl::Milliseconds(50)).code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClientTest, ModelIsFoundAndDescribed) {
  InferenceClient client = Client();
  const auto model = client.OnlyModel(absl::Seconds(20));
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(*model, "fake");
  const auto description = client.DescribeModel(*model, absl::Seconds(20));
  ASSERT_TRUE(description.ok()) << description.status();
  EXPECT_EQ(description->hidden, 2);
  EXPECT_EQ(description->topk, 1);
}

TEST_F(ClientTest, AdminAnswersAndErrorsArrive) {
  AdminClient admin(service_.target());
  const auto cluster = admin.GetClusterStatus(absl::Seconds(20));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  EXPECT_EQ(cluster->epoch, 42u);
  ASSERT_EQ(cluster->workers.size(), 1u);
  EXPECT_EQ(cluster->workers[0].worker_id, "worker-0");
  EXPECT_TRUE(admin.DrainWorker("worker-0", absl::Seconds(20)).ok());
  const absl::Status status = admin.DrainWorker("worker-9", absl::Seconds(20));
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("worker-9"));
}

}  // namespace
}  // namespace epserve::client
