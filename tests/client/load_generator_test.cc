#include "client/command/load_generator.h"

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

std::vector<InferRequest> Inputs(absl::Duration timeout) {
  InferRequest request;
  request.model = "fake";
  request.hidden_states = MakeTensor(ElementType::kF32, {1, 2}, {1, 2});
  request.timeout = timeout;
  return {request};
}

TEST(LoadGeneratorTest, ClosedLoopPausesAfterAFailure) {
  FakeService service;
  service.set_handler([](grpc::ServerContext&, const inference::ModelInferRequest&,
                         inference::ModelInferResponse&) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "no worker");
  });
  InferenceClient client({.target = service.target()});
  LoadPlan plan;
  plan.concurrency = 2;
  plan.requests = 20;
  const LoadResult result =
      RunLoad(client, Inputs(absl::Seconds(30)), plan, [](std::int64_t, double) {});
  EXPECT_EQ(result.samples.size(), 20u);
  EXPECT_GE(result.seconds, (20 / 2 - 1) * 0.020);
  EXPECT_EQ(result.first_message.at("UNAVAILABLE"), "no worker");
}

TEST(LoadGeneratorTest, ClosedLoopComesBackWhenTheServiceHasAskedForIt) {
  for (const bool streaming : {false, true}) {
    FakeService service;
    service.set_handler([](grpc::ServerContext& context, const inference::ModelInferRequest&,
                           inference::ModelInferResponse& response) {
      (*response.mutable_parameters())["epserve_retry_pushback_ms"].set_int64_param(200);
      context.AddTrailingMetadata("grpc-retry-pushback-ms", "200");
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
    });
    InferenceClient client({.target = service.target()});
    LoadPlan plan;
    plan.streaming = streaming;
    plan.requests = 3;
    const absl::Time started = absl::Now();
    RunLoad(client, Inputs(absl::Seconds(30)), plan, [](std::int64_t, double) {});
    EXPECT_GE(absl::Now() - started, absl::Milliseconds(400)) << streaming;
  }
}

TEST(LoadGeneratorTest, PauseThatBeginsLaterMayEndEarlier) {
  std::size_t num_samples = 0;
  // On a busy machine a few requests may take longer than a short run does.
  for (int run_ms = 500; num_samples < 4 && run_ms <= 16'000; run_ms *= 2) {
    FakeService service;
    std::atomic<int> number{0};
    service.set_handler([&](grpc::ServerContext& context, const auto&, auto&) {
      // The first is away for longer than the run takes, the others for a moment.
      if (number++ == 0) {
        context.AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(2 * run_ms));
      }
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
    });
    InferenceClient client({.target = service.target()});
    LoadPlan plan;
    plan.concurrency = 2;
    plan.duration = absl::Milliseconds(run_ms);
    num_samples = RunLoad(client, Inputs(absl::Seconds(30)), plan, [](std::int64_t, double) {
                  }).samples.size();
  }
  EXPECT_GE(num_samples, 4u);
}

TEST(LoadGeneratorTest, ClosedLoopDoesNotPauseAfterAnAnswer) {
  FakeService service;
  InferenceClient client({.target = service.target()});
  LoadPlan plan;
  plan.requests = 500;  // So many that their pauses would take longer than a busy machine does.
  const LoadResult result =
      RunLoad(client, Inputs(absl::Seconds(30)), plan, [](std::int64_t, double) {});
  EXPECT_EQ(result.samples.size(), 500u);
  EXPECT_LT(result.seconds, 500 * 0.020);
}

// All at once, no more, and no fewer: each request waits until as many are under way.
TEST(LoadGeneratorTest, ClosedLoopKeepsAsManyUnderWayAsAsked) {
  constexpr int kConcurrency = 8;
  for (const bool streaming : {false, true}) {
    FakeService service;
    std::atomic<int> under_way{0};
    std::atomic<int> most{0};
    std::atomic<bool> all_came{false};
    service.set_handler([&](grpc::ServerContext& context, const auto& request, auto& response) {
      const int now = ++under_way;
      for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
      }
      if (now == kConcurrency) all_came = true;
      while (!all_came && !context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
      --under_way;
      return FakeService::Echo(context, request, response);
    });
    InferenceClient client({.target = service.target()});
    LoadPlan plan;
    plan.concurrency = kConcurrency;
    plan.streaming = streaming;
    plan.requests = 100;
    const LoadResult result =
        RunLoad(client, Inputs(absl::Seconds(30)), plan, [](std::int64_t, double) {});
    EXPECT_EQ(most, kConcurrency) << streaming;
    ASSERT_EQ(result.samples.size(), 100u);
    for (const Sample& sample : result.samples) {
      EXPECT_EQ(sample.code, absl::StatusCode::kOk);
      EXPECT_GT(sample.request_us, 0);
      EXPECT_EQ(sample.phases_us[kFfnPhase], 7);
      EXPECT_EQ(sample.phases_us.front(), kNoTime);
      EXPECT_EQ(sample.trace, nullptr);
    }
  }
}

TEST(LoadGeneratorTest, StreamingLoopGoesOnAfterAFailureAndAfterAStreamThatBreaks) {
  FakeService service;
  std::atomic<int> number{0};
  service.set_handler([&](grpc::ServerContext& context, const inference::ModelInferRequest& request,
                          inference::ModelInferResponse& response) {
    switch (number++) {
      case 3:
        return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "bad");
      case 6:
        return grpc::Status(grpc::StatusCode::ABORTED, "broken");  // ends the stream
      default:
        return FakeService::Echo(context, request, response);
    }
  });
  InferenceClient client({.target = service.target()});
  LoadPlan plan;
  plan.streaming = true;
  plan.requests = 20;
  const LoadResult result =
      RunLoad(client, Inputs(absl::Seconds(30)), plan, [](std::int64_t, double) {});
  EXPECT_EQ(result.samples.size(), 20u);
  EXPECT_EQ(result.first_message.at("INVALID_ARGUMENT"), "bad");
  EXPECT_EQ(result.first_message.at("ABORTED"), "broken");
  EXPECT_EQ(result.first_message.size(), 2u);
}

TEST(LoadGeneratorTest, OpenLoopStartsNothingAfterItsDurationAgainstAStalledService) {
  FakeService service;
  service.set_handler([](grpc::ServerContext& context, const inference::ModelInferRequest&,
                         inference::ModelInferResponse&) {
    while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(5));
    return grpc::Status::CANCELLED;
  });
  InferenceClient client({.target = service.target()});
  LoadPlan plan;
  plan.rate = 1000;
  plan.duration = absl::Milliseconds(1200);
  plan.max_under_way = 4;
  const LoadResult result =
      RunLoad(client, Inputs(absl::Seconds(3)), plan, [](std::int64_t, double) {});
  EXPECT_EQ(result.samples.size(), 4u);
  for (const Sample& sample : result.samples) {
    EXPECT_EQ(sample.code, absl::StatusCode::kDeadlineExceeded);
  }
}

}  // namespace
}  // namespace epserve::client
