// Asynchronous streams of requests, against a fake service.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <ctime>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/cpp/client.h"
#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

InferRequest Numbered(int number) {
  InferRequest request;
  request.model = "fake";
  request.id = absl::StrCat("r", number);
  request.hidden_states =
      MakeTensor(ElementType::kF32, {1, 2}, {static_cast<double>(number), -1.0});
  return request;
}

// What came, in its order: ids of results, codes of errors.
class Arrivals {
 public:
  InferCallback Callback() {
    return [this](const absl::StatusOr<InferResult>& result) {
      absl::MutexLock lock(&mutex_);
      come_.push_back(result.ok() ? result->id : absl::StatusCodeToString(result.status().code()));
      if (!result.ok()) last_message_ = std::string(result.status().message());
    };
  }
  std::vector<std::string> Await(std::size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto all = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return come_.size() >= count; };
    mutex_.Await(absl::Condition(&all));
    return come_;
  }
  std::string last_message() {
    absl::MutexLock lock(&mutex_);
    return last_message_;
  }

 private:
  absl::Mutex mutex_;
  std::vector<std::string> come_ ABSL_GUARDED_BY(mutex_);
  std::string last_message_ ABSL_GUARDED_BY(mutex_);
};

class AsyncInferStreamTest : public testing::Test {
 protected:
  AsyncInferStreamTest() : client_(ClientOptions{.target = service_.target()}) {}

  // A handler that holds every request until Open, or until the call is cancelled.
  void Hold() {
    service_.set_handler([this](grpc::ServerContext& context, const auto& request, auto& response) {
      entered_ = true;
      while (!open_ && !context.IsCancelled()) std::this_thread::yield();
      return FakeService::Echo(context, request, response);
    });
  }
  void Open() { open_ = true; }
  void AwaitEntered() {
    while (!entered_) std::this_thread::yield();
  }

  std::atomic<bool> entered_{false};
  std::atomic<bool> open_{false};
  FakeService service_;
  Arrivals arrivals_;
  InferenceClient client_;
};

TEST_F(AsyncInferStreamTest, ResultsComeInOrderFromSeveralSendersAtOnce) {
  constexpr int kSenders = 4;
  constexpr int kEach = 100;
  const auto stream = client_.OpenAsyncStream({.max_under_way = kSenders * kEach});
  absl::Mutex mutex;
  std::vector<std::string> sent;
  std::vector<std::thread> senders;
  for (int s = 0; s < kSenders; ++s) {
    senders.emplace_back([&, s] {
      for (int i = 0; i < kEach; ++i) {
        const InferRequest request = Numbered(s * kEach + i);
        absl::MutexLock lock(&mutex);  // So that the order is known.
        sent.push_back(request.id);
        ASSERT_TRUE(stream->Send(request, arrivals_.Callback()).ok());
      }
    });
  }
  for (std::thread& sender : senders) sender.join();
  EXPECT_EQ(arrivals_.Await(kSenders * kEach), sent);
}

// Copied at once, or in pieces that are joined here.
class MemoryReuseTest : public AsyncInferStreamTest,
                        public ::testing::WithParamInterface<std::int64_t> {};
INSTANTIATE_TEST_SUITE_P(Sizes, MemoryReuseTest, ::testing::Values(10'000, 1'000'000));

TEST_P(MemoryReuseTest, CallbackSendsTheNextAndTakesTheLastMemory) {
  const auto stream = client_.OpenAsyncStream({.max_under_way = 1});
  constexpr int kRequests = 20;
  InferRequest request = Numbered(0);
  const std::string text(static_cast<std::size_t>(GetParam()) * 4, 'x');
  request.hidden_states = Tensor{ElementType::kF32, {GetParam(), 1}, text};
  std::vector<const char*> memory;
  absl::Notification done;
  std::function<void(absl::StatusOr<InferResult>)> next = [&](absl::StatusOr<InferResult> result) {
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->hidden_states.bytes, request.hidden_states.bytes);
    memory.push_back(result->hidden_states.bytes.data());
    if (memory.size() == kRequests) return done.Notify();
    ASSERT_TRUE(stream->Send(request, next, std::move(result->hidden_states.bytes)).ok());
  };
  ASSERT_TRUE(stream->Send(request, next).ok());
  done.WaitForNotification();
  for (const char* at : memory) EXPECT_EQ(at, memory.front());
}

TEST_F(AsyncInferStreamTest, MoreThanMayBeUnderWayIsRefusedUntilOneIsAnswered) {
  Hold();
  const auto stream = client_.OpenAsyncStream({.max_under_way = 2});
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(stream->Send(Numbered(i), arrivals_.Callback()).ok());
  const absl::Status refused = stream->Send(Numbered(2), arrivals_.Callback());
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("max_under_way"));
  Open();
  arrivals_.Await(2);
  ASSERT_TRUE(stream->Send(Numbered(3), arrivals_.Callback()).ok());
  EXPECT_THAT(arrivals_.Await(3), ElementsAre("r0", "r1", "r3"));
}

TEST_F(AsyncInferStreamTest, FailedRequestIsAnErrorInItsPlaceAndTheStreamGoesOn) {
  service_.set_handler(
      FakeService::EchoBut("r1", {grpc::StatusCode::RESOURCE_EXHAUSTED, "queue full"}));
  const auto stream = client_.OpenAsyncStream();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(stream->Send(Numbered(i), arrivals_.Callback()).ok());
  EXPECT_THAT(arrivals_.Await(3), ElementsAre("r0", "RESOURCE_EXHAUSTED", "r2"));
  EXPECT_EQ(arrivals_.last_message(), "queue full");
}

TEST_F(AsyncInferStreamTest, StreamThatBreaksSaysWhyForAllThatItOwes) {
  service_.set_handler([](grpc::ServerContext&, const auto&, auto&) {
    return grpc::Status(grpc::StatusCode::ABORTED, "the end");
  });
  const auto stream = client_.OpenAsyncStream();
  ASSERT_TRUE(stream->Send(Numbered(0), arrivals_.Callback()).ok());
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("ABORTED"));
  EXPECT_EQ(arrivals_.last_message(), "the end");
  const absl::Status refused = stream->Send(Numbered(1), arrivals_.Callback());
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("the end"));
}

TEST_F(AsyncInferStreamTest, ServiceThatIsNotThereIsUnavailable) {
  InferenceClient nowhere({.target = "127.0.0.1:1"});
  const auto stream = nowhere.OpenAsyncStream();
  // What is sent before the stream knows is answered, what comes later is refused.
  const absl::Status sent = stream->Send(Numbered(0), arrivals_.Callback());
  if (!sent.ok()) {
    EXPECT_EQ(sent.code(), absl::StatusCode::kUnavailable) << sent;
    return;
  }
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("UNAVAILABLE"));
}

TEST_F(AsyncInferStreamTest, WrongTensorsAreRefusedAndNotSent) {
  const auto stream = client_.OpenAsyncStream();
  InferRequest wrong = Numbered(0);
  wrong.hidden_states.bytes = std::string(7, 'x');
  EXPECT_EQ(stream->Send(wrong, arrivals_.Callback()).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(stream->Send(Numbered(1), arrivals_.Callback()).ok());
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("r1"));
}

TEST_F(AsyncInferStreamTest, EndLetsWhatIsUnderWayBeAnsweredAndTakesNoMore) {
  Hold();
  const auto stream = client_.OpenAsyncStream();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(stream->Send(Numbered(i), arrivals_.Callback()).ok());
  stream->End();
  EXPECT_EQ(stream->Send(Numbered(3), arrivals_.Callback()).code(),
            absl::StatusCode::kFailedPrecondition);
  Open();
  EXPECT_THAT(arrivals_.Await(3), ElementsAre("r0", "r1", "r2"));
}

TEST_F(AsyncInferStreamTest, CancelEndsWhatIsUnderWay) {
  Hold();
  const auto stream = client_.OpenAsyncStream();
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(stream->Send(Numbered(i), arrivals_.Callback()).ok());
  AwaitEntered();
  stream->Cancel();
  EXPECT_THAT(arrivals_.Await(2), ElementsAre("CANCELLED", "CANCELLED"));
}

TEST_F(AsyncInferStreamTest, DroppedStreamAndClientStillCallBack) {
  Hold();
  {
    InferenceClient client(ClientOptions{.target = service_.target()});
    const auto stream = client.OpenAsyncStream();
    ASSERT_TRUE(stream->Send(Numbered(0), arrivals_.Callback()).ok());
    AwaitEntered();
  }
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("CANCELLED"));
}

TEST_F(AsyncInferStreamTest, StreamMayBeDroppedByItsCallback) {
  auto stream = client_.OpenAsyncStream();
  absl::Notification dropped;
  ASSERT_TRUE(stream
                  ->Send(Numbered(0),
                         [&](const absl::StatusOr<InferResult>& result) {
                           EXPECT_TRUE(result.ok()) << result.status();
                           stream = nullptr;
                           dropped.Notify();
                         })
                  .ok());
  dropped.WaitForNotification();
}

TEST_F(AsyncInferStreamTest, TimeoutEndsTheStream) {
  Hold();
  const auto stream = client_.OpenAsyncStream({.timeout = absl::Milliseconds(1500)});
  ASSERT_TRUE(stream->Send(Numbered(0), arrivals_.Callback()).ok());
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("DEADLINE_EXCEEDED"));
}

TEST_F(AsyncInferStreamTest, StreamsOverSeveralThreadsAreAllAnswered) {
  InferenceClient client(ClientOptions{.target = service_.target(), .async_threads = 3});
  std::vector<std::unique_ptr<AsyncInferStream>> streams;
  for (int i = 0; i < 6; ++i) {
    streams.push_back(client.OpenAsyncStream());
    ASSERT_TRUE(streams.back()->Send(Numbered(i), arrivals_.Callback()).ok());
  }
  EXPECT_THAT(arrivals_.Await(6),
              testing::UnorderedElementsAre("r0", "r1", "r2", "r3", "r4", "r5"));
}

// Processor time of the whole process, of which nothing but the client has anything to do.
absl::Duration ProcessorTime() {
  timespec used{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return absl::DurationFromTimespec(used);
}

TEST_F(AsyncInferStreamTest, ThreadLooksForTheResultWhereAskedToAndThenSleeps) {
  absl::Notification may_answer;
  service_.set_handler([&](grpc::ServerContext& context, const auto& request, auto& response) {
    may_answer.WaitForNotification();
    return FakeService::Echo(context, request, response);
  });
  constexpr absl::Duration kMuch = absl::Milliseconds(100);
  const absl::Time give_up = absl::Now() + absl::Seconds(60);
  InferenceClient looking(ClientOptions{.target = service_.target(), .busy_poll = absl::Hours(1)});
  const auto stream = looking.OpenAsyncStream();
  absl::Duration before = ProcessorTime();
  ASSERT_TRUE(stream->Send(Numbered(1), arrivals_.Callback()).ok());
  bool looks = false;
  while (!looks && absl::Now() < give_up) {
    absl::SleepFor(absl::Milliseconds(5));
    looks = ProcessorTime() - before >= kMuch;
  }
  EXPECT_TRUE(looks);
  // No longer than kMaxBusyPoll, whatever is asked for: then it is woken by the result.
  bool sleeps = false;
  while (!sleeps && absl::Now() < give_up) {
    before = ProcessorTime();
    absl::SleepFor(absl::Milliseconds(300));
    sleeps = ProcessorTime() - before < kMuch;
  }
  EXPECT_TRUE(sleeps);
  may_answer.Notify();
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("r1"));
}

TEST_F(AsyncInferStreamTest, ThreadSleepsUntilTheResultWhereNotAsked) {
  absl::Notification may_answer;
  service_.set_handler([&](grpc::ServerContext& context, const auto& request, auto& response) {
    may_answer.WaitForNotification();
    return FakeService::Echo(context, request, response);
  });
  const auto stream = client_.OpenAsyncStream();
  ASSERT_TRUE(stream->Send(Numbered(1), arrivals_.Callback()).ok());
  const absl::Duration before = ProcessorTime();
  absl::SleepFor(absl::Milliseconds(500));
  EXPECT_LT(ProcessorTime() - before, absl::Milliseconds(100));
  may_answer.Notify();
  EXPECT_THAT(arrivals_.Await(1), ElementsAre("r1"));
}

}  // namespace
}  // namespace epserve::client
