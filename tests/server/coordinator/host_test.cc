#include "server/coordinator/host.h"

#include <future>
#include <memory>
#include <span>
#include <thread>
#include <utility>

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

class HostTest : public ::testing::Test {
 protected:
  HostTest() {
    Config config;
    config.num_workers = 2;
    config.num_experts = 4;
    config.topk = 1;
    config.layers = {0};
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

}  // namespace
}  // namespace epserve::coordinator
