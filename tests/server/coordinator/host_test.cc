#include "server/coordinator/host.h"

#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {
namespace {

using Answer = std::pair<absl::Status, std::thread::id>;

class RecordedRequest final : public PendingRequest {
 public:
  RecordedRequest(std::uint64_t id, ValidatedRequest request, std::promise<Answer> answer)
      : PendingRequest(id, Clock::now(), Clock::time_point::max(), std::move(request)),
        answer_(std::move(answer)) {}

  std::span<char> MutableOutput() override { return {}; }
  void TakeOutput(std::span<const char>, std::shared_ptr<const void>) override {}
  void Complete(Completion completion) override {
    answer_.set_value({completion.status, std::this_thread::get_id()});
  }

 private:
  std::promise<Answer> answer_;
};

// Keeps what a worker is sent.
class RecordedStream final : public WorkerStream {
 public:
  void Send(StreamMessage message) override {
    const std::lock_guard<std::mutex> lock(mu_);
    sent_.push_back(std::move(message));
  }
  void Close(absl::Status, bool) override {}

  // The epoch of the last message of that kind; 0: there is none.
  template <typename Message>
  EpochId EpochOfLast() const {
    const std::lock_guard<std::mutex> lock(mu_);
    EpochId epoch = 0;
    for (const StreamMessage& message : sent_) {
      if (const auto* found = std::get_if<Message>(&message)) epoch = found->epoch;
    }
    return epoch;
  }

 private:
  mutable std::mutex mu_;
  std::vector<StreamMessage> sent_;
};

class HostTest : public ::testing::Test {
 protected:
  HostTest() {
    Config config;
    config.num_workers = 2;
    config.num_experts = 4;
    config.topk = 1;
    config.layers = {0};
    config.lease_us = 60'000'000;  // Nobody beats here.
    host_ = std::make_unique<Host>(config, /*hidden=*/8, RowTransport{}, &metrics_, HostHooks{});
    host_->Start();
  }

  // There is no worker, so the answer is UNAVAILABLE, by whoever took the turn.
  Answer Submit(std::uint64_t id, ValidatedRequest request) {
    std::promise<Answer> promise;
    std::future<Answer> answer = promise.get_future();
    host_->Submit(std::make_unique<RecordedRequest>(id, std::move(request), std::move(promise)));
    return answer.get();
  }
  Answer Submit(std::uint64_t id, std::uint64_t output_bytes) {
    return Submit(id, MakeValidated(output_bytes));
  }

  static ValidatedRequest MakeValidated(std::uint64_t output_bytes) {
    ValidatedRequest request;
    request.num_tokens = 1;
    request.output_bytes = output_bytes;
    return request;
  }

  // A worker that has kept the weights of rank `id` - 1, so that no lease is waited for.
  std::shared_ptr<RecordedStream> Join(StreamId id) {
    const auto stream = std::make_shared<RecordedStream>();
    HelloInfo hello;
    hello.worker_id = absl::StrCat("w", id);
    hello.incarnation = absl::StrCat("incarnation-", id);
    hello.backend = "host";
    hello.held_rank = static_cast<int>(id) - 1;
    hello.held_num_ranks = 2;
    host_->OpenStream(id, stream, hello);
    Report(WorkerLoaded{id, hello.held_rank, 2, 1, 1});
    return stream;
  }
  // Returns once the host has taken it in, whoever had the turn.
  void Report(Event event, std::string handle_type = "") {
    WorkerReport report;
    report.event = std::move(event);
    report.handle_type = std::move(handle_type);
    host_->Report(std::move(report));
    std::promise<void> taken;
    host_->QueryCluster([&](const absl::StatusOr<ClusterView>&) { taken.set_value(); });
    taken.get_future().wait();
  }
  void ExpectHeaps(const std::string& type, int count) {
    EXPECT_THAT(metrics_.Render(), ::testing::HasSubstr(absl::StrCat("epserve_heaps{handle_type=\"",
                                                                     type, "\"} ", count, "\n")));
  }

  Metrics metrics_{4};
  std::unique_ptr<Host> host_;
};

TEST_F(HostTest, SmallRequestIsServedByTheThreadThatBringsIt) {
  const auto [status, thread] = Submit(1, 64);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(thread, std::this_thread::get_id());
}

TEST_F(HostTest, LargeRequestIsServedByAnotherThreadAndSmallOnesAfterItAsBefore) {
  const auto [status, thread] = Submit(1, 64 << 20);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_NE(thread, std::this_thread::get_id());
  // The timer's thread may still be at it; what comes meanwhile it takes along.
  for (std::uint64_t id = 2; Submit(id, 64).second != std::this_thread::get_id(); ++id) {
    ASSERT_LT(id, 10'000u) << "the count of large requests has not come down";
  }
}

TEST_F(HostTest, LargeRequestOfWhichNothingIsCopiedHereIsServedByTheThreadThatBringsIt) {
  ShmRegionInfo info;
  info.id = 1;
  info.kind = ShmKind::kCuda;
  const auto region = std::make_shared<ShmRegion>(info, runtime::UniqueFd());
  ValidatedRequest on_device = MakeValidated(64 << 20);
  on_device.source = {region, 0};
  on_device.output = {region, 0};
  EXPECT_EQ(Submit(1, std::move(on_device)).second, std::this_thread::get_id());
  ValidatedRequest half = MakeValidated(64 << 20);
  half.source = {region, 0};
  EXPECT_NE(Submit(2, std::move(half)).second, std::this_thread::get_id());
}

TEST_F(HostTest, HeapsAreCountedWhileTheirEpochLastsThatOfAnOlderWorkerAsOther) {
  const auto first = Join(1);
  const auto second = Join(2);
  const EpochId epoch = first->EpochOfLast<CreateHeapMessage>();
  ASSERT_NE(epoch, 0u);
  ASSERT_EQ(second->EpochOfLast<CreateHeapMessage>(), epoch);
  ExpectHeaps("shm", 0);
  Report(HeapCreated{1, epoch, "handle"}, "shm");
  Report(HeapCreated{2, epoch, "handle"});
  ExpectHeaps("shm", 1);
  ExpectHeaps("other", 1);
  Report(StreamClosed{2});
  ASSERT_EQ(first->EpochOfLast<SendEpochEnded>(), epoch);
  ExpectHeaps("shm", 0);
  ExpectHeaps("other", 0);
  Report(HeapCreated{1, epoch, "handle"}, "shm");  // It crossed the end of its epoch.
  ExpectHeaps("shm", 0);
}

TEST_F(HostTest, HeapOfAWorkerThatLeavesItsEpochUnaskedIsCountedNoMore) {
  const auto first = Join(1);
  const auto second = Join(2);
  const EpochId epoch = first->EpochOfLast<CreateHeapMessage>();
  Report(HeapCreated{1, epoch, "handle"}, "shm");
  Report(HeapCreated{2, epoch, "handle"}, "shm");
  ExpectHeaps("shm", 2);
  Report(EpochQuiesced{1, epoch});
  ASSERT_EQ(second->EpochOfLast<SendEpochEnded>(), epoch);
  ExpectHeaps("shm", 0);
}

}  // namespace
}  // namespace epserve::coordinator
