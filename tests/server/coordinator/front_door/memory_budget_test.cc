// What all requests together may hold, by itself and behind the front door.
#include "server/coordinator/front_door/memory_budget.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "server/coordinator/front_door/infer_call.h"
#include "tests/server/coordinator/front_door/infer_service_fixture.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using inference::ModelStreamInferResponse;
using testing::HasSubstr;

TEST(MemoryBudgetTest, RefusesWhatIsTooMuchBesideTheOthersAndTakesItBack) {
  MemoryBudget budget(100);
  {
    MemoryBudget::Share first(budget);
    ASSERT_TRUE(first.Grow(60).ok());
    MemoryBudget::Share second(budget);
    const absl::Status refused = second.Grow(41);
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(refused.message()), HasSubstr("41 bytes beside the 60"));
    EXPECT_TRUE(second.Grow(40).ok());
    EXPECT_EQ(budget.held_bytes(), 100);
  }
  EXPECT_EQ(budget.held_bytes(), 0);
}

TEST(MemoryBudgetTest, LetsThroughWhatStandsAlone) {
  MemoryBudget budget(100);
  MemoryBudget::Share alone(budget);
  EXPECT_TRUE(alone.Grow(90).ok());
  EXPECT_TRUE(alone.Grow(900).ok());
  MemoryBudget::Share other(budget);
  EXPECT_FALSE(other.Grow(1).ok());
}

TEST(MemoryBudgetTest, PartsOfAShareAreGivenBackByThemselves) {
  MemoryBudget budget(100);
  MemoryBudget::Share whole(budget);
  ASSERT_TRUE(whole.Grow(60).ok());
  {
    const MemoryBudget::Share part = whole.Split(40);
    EXPECT_EQ(budget.held_bytes(), 60);
  }
  EXPECT_EQ(budget.held_bytes(), 20);
  whole.Release();
  EXPECT_EQ(budget.held_bytes(), 0);
}

MemoryBudget::TimePoint fake_now;

// A share of `bytes` whose caller is waited for, and how often it was given up.
struct Waiting {
  Waiting(MemoryBudget& budget, std::int64_t bytes) : share(budget) {
    EXPECT_TRUE(share.Grow(bytes).ok());
    share.AwaitCaller([this] { ++times_given_up; });
  }
  int times_given_up = 0;
  MemoryBudget::Share share;
};

TEST(MemoryBudgetTest, NewcomerTakesTheRoomOfTheRepliesThatWaitedLongest) {
  MemoryBudget budget(100, [] { return fake_now; });
  MemoryBudget::Share under_way(budget);
  ASSERT_TRUE(under_way.Grow(10).ok());
  Waiting oldest(budget, 30);
  Waiting taken(budget, 10);
  fake_now += std::chrono::milliseconds(1);
  Waiting second(budget, 30);
  fake_now += MemoryBudget::kLeastWait - std::chrono::milliseconds(1);
  Waiting fresh(budget, 20);
  taken.share.Release();  // Its caller came.
  {
    MemoryBudget::Share fitting(budget);
    ASSERT_TRUE(fitting.Grow(10).ok());
    EXPECT_EQ(oldest.times_given_up, 0) << "there was room";
    EXPECT_EQ(fitting.Grow(31).code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(oldest.times_given_up, 0) << "not worth it: the second is too young by a little";
    ASSERT_TRUE(fitting.Grow(30).ok());
    EXPECT_EQ(oldest.times_given_up, 1);
    EXPECT_EQ(budget.held_bytes(), 100);
  }
  fake_now += MemoryBudget::kLeastWait;
  MemoryBudget::Share newcomer(budget);
  EXPECT_FALSE(newcomer.Grow(91).ok()) << "what is under way is never given up";
  EXPECT_TRUE(newcomer.Grow(60).ok());
  EXPECT_EQ(second.times_given_up, 1);
  EXPECT_EQ(fresh.times_given_up, 0) << "only as many as are needed";
  EXPECT_EQ(oldest.times_given_up, 1);
  EXPECT_EQ(taken.times_given_up, 0);
  second.share.Release();
  EXPECT_EQ(budget.held_bytes(), 90) << "what was taken from it is not given back again";
}

TEST(MemoryBudgetTest, WaitingRepliesAreGivenUpBesideTheirReleaseOnOtherThreads) {
  // Every reply is old at once, so that each newcomer gives up whatever is being released.
  MemoryBudget budget(100, [] {
    static std::atomic<std::int64_t> seconds = 0;
    return MemoryBudget::TimePoint(std::chrono::seconds(seconds += 20));
  });
  std::vector<std::thread> threads;
  std::atomic<int> refused = 0;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&budget, &refused] {
      for (int round = 0; round < 5000; ++round) {
        const auto given_up = std::make_unique<int>(0);
        MemoryBudget::Share share(budget);
        if (!share.Grow(60).ok()) {
          ++refused;
          continue;
        }
        share.AwaitCaller([&given_up] { ++*given_up; });
        if (round % 2 == 0) std::this_thread::yield();
        share.Release();
        EXPECT_LE(*given_up, 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(refused, 4 * 5000);
  EXPECT_EQ(budget.held_bytes(), 0);
}

constexpr std::size_t kHeavyBytes = 32 << 10;
constexpr std::int64_t kHeldBytes = 8 * kHeavyBytes;

class HeldBytesTest : public InferServiceTest {
 protected:
  HeldBytesTest() : InferServiceTest(Allowed(), kHeldBytes) {}
};

// A parameter is as good a burden as a tensor: it is held until there is an output.
ModelInferRequest Heavy(ModelInferRequest request) {
  (*request.mutable_parameters())["triton_burden"].set_string_param(std::string(kHeavyBytes, 'x'));
  return request;
}

TEST_F(HeldBytesTest, RequestsOfAllCallersTogetherAreBoundedUntilTheirRepliesHaveGone) {
  constexpr int kStreams = 2;
  constexpr int kPerStream = kHeldBytes / kHeavyBytes / kStreams;
  grpc::ClientContext contexts[kStreams];
  std::vector<
      std::unique_ptr<grpc::ClientReaderWriter<ModelInferRequest, ModelStreamInferResponse>>>
      streams;
  std::vector<std::unique_ptr<PendingRequest>> under_way;
  for (grpc::ClientContext& context : contexts) {
    streams.push_back(stub_->ModelStreamInfer(&context));
    // The last of the second one would pass the limit: the requests' other fields count too.
    const int fitting = streams.size() == kStreams ? kPerStream - 1 : kPerStream;
    for (int i = 0; i < fitting; ++i) {
      ASSERT_TRUE(streams.back()->Write(Heavy(ValidMessage())));
      under_way.push_back(sink_.Take());
      ASSERT_NE(under_way.back(), nullptr);
    }
  }
  const grpc::Status refused = Infer(Heavy(ValidMessage()));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.error_message(), HasSubstr("--max-held-bytes"));

  sink_.HandleBy(Echo);
  EXPECT_TRUE(Infer(ValidMessage()).ok());  // There is room for a small one.
  for (auto& request : under_way) Echo(std::move(request));
  ModelStreamInferResponse response;
  for (std::size_t i = 0; i < under_way.size(); ++i) {
    ASSERT_TRUE(streams[i / kPerStream]->Read(&response));
    EXPECT_EQ(response.error_message(), "");
  }
  for (auto& stream : streams) {
    stream->WritesDone();
    EXPECT_FALSE(stream->Read(&response));
    EXPECT_TRUE(stream->Finish().ok());
  }
  EXPECT_TRUE(Infer(Heavy(ValidMessage())).ok());
}

TEST_F(HeldBytesTest, ReplyThatWaitsHoldsItsOutputAndNotItsRequest) {
  FrontDoorOptions options;
  options.model = TestModel();
  InferContext context{options, regions_, sink_};
  const auto start = [&context](const std::string& bytes) {
    // As long as it lives, its caller has not taken the reply.
    auto call = std::make_shared<InferCall>(context, InferForm::kUnary, 1, [](InferAnswer) {});
    const grpc::Slice slice(bytes);
    call->Start(grpc::ByteBuffer(&slice, 1), InferCall::Clock::time_point::max(), true);
    return call;
  };
  const std::string bytes = Heavy(ValidMessage()).SerializeAsString();
  const std::int64_t output_bytes = 3 * 4 * sizeof(float);
  {
    const auto waiting = start(bytes);
    const auto request = sink_.Take();
    ASSERT_NE(request, nullptr);
    EXPECT_EQ(context.memory.held_bytes(), static_cast<std::int64_t>(bytes.size()) + output_bytes);
  }
  EXPECT_EQ(context.memory.held_bytes(), 0) << "neither call nor request is there";
  sink_.HandleBy(Echo);
  {
    const auto answered = start(bytes);
    EXPECT_EQ(context.memory.held_bytes(), output_bytes);
  }
  EXPECT_EQ(context.memory.held_bytes(), 0);
  const auto refused = start(bytes.substr(1));
  EXPECT_EQ(context.memory.held_bytes(), 0);
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    request->Complete({absl::UnavailableError("the worker has gone"), {}, 0});
  });
  const auto failed = start(bytes);
  EXPECT_EQ(context.memory.held_bytes(), 0) << "what says that it failed is small";
}

}  // namespace
}  // namespace epserve::coordinator
