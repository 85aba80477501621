#include "runtime/alltoallv/nccl_watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <string>

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

constexpr auto kLong = std::chrono::seconds(60);  // until a test is taken to hang

class NcclWatchTest : public ::testing::Test {
 protected:
  NcclWatchTest() {
    config_.rank = 5;
    config_.timeout = absl::Milliseconds(16);
    config_.words = words_;
    config_.stages = {"dispatch", "combine"};
    config_.check_errors = [this] {
      if (looks_ == last_look_) all_looked_.set_value();
      if (looks_ <= last_look_) ++looks_;
      return OnLook();
    };
    config_.abort = [this] {
      ++aborts_;
      started_.wait();
      aborted_.set_value(watch_->status());
    };
  }
  ~NcclWatchTest() override { watch_.reset(); }

  absl::Status OnLook() { return on_look_ ? on_look_() : absl::OkStatus(); }

  void Start() {
    watch_ = std::make_unique<NcclWatch>(config_);
    has_started_.set_value();
  }
  // What the watch's status was when it aborted.
  absl::Status WaitForAbort() {
    auto future = aborted_.get_future();
    if (future.wait_for(kLong) != std::future_status::ready) return absl::UnknownError("no abort");
    return future.get();
  }
  void WaitForLooks() {
    ASSERT_EQ(all_looked_.get_future().wait_for(kLong), std::future_status::ready);
  }

  std::uint64_t words_[2] = {0, 0};
  NcclWatchConfig config_;
  std::function<absl::Status()> on_look_;
  int looks_ = 0;        // the watch's thread alone
  int last_look_ = 100;  // of 1 ms each: six timeouts
  std::atomic<int> aborts_ = 0;
  std::promise<absl::Status> aborted_;
  std::promise<void> all_looked_;
  std::promise<void> has_started_;  // watch_ is there
  std::shared_future<void> started_ = has_started_.get_future().share();
  std::unique_ptr<NcclWatch> watch_;
};

TEST_F(NcclWatchTest, TransferThatTakesTooLongIsGivenUpByName) {
  words_[1] = 3;
  Start();
  const absl::Status status = WaitForAbort();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("combine: rank 5 waited"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("peer timeout of 16 ms"));
  EXPECT_EQ(watch_->status(), status);
}

TEST_F(NcclWatchTest, TransfersThatMoveOnAreLeftAlone) {
  words_[0] = 1;
  on_look_ = [this] {
    words_[0] += 2;  // The next transfer is under way by the next look.
    return absl::OkStatus();
  };
  Start();
  WaitForLooks();
  EXPECT_TRUE(watch_->status().ok()) << watch_->status();
  watch_.reset();
  EXPECT_EQ(aborts_, 0);
}

TEST_F(NcclWatchTest, IdleLanesAreLeftAlone) {
  words_[0] = 2;
  Start();
  WaitForLooks();
  EXPECT_TRUE(watch_->status().ok()) << watch_->status();
  watch_.reset();
  EXPECT_EQ(aborts_, 0);
}

TEST_F(NcclWatchTest, AbortGivesTransfersUp) {
  config_.timeout = absl::Hours(1);
  Start();
  watch_->Abort();
  EXPECT_EQ(WaitForAbort().code(), absl::StatusCode::kAborted);
  watch_->Abort();
  watch_.reset();
  EXPECT_EQ(aborts_, 1);
}

TEST_F(NcclWatchTest, ErrorOfThePeerGivesTransfersUp) {
  on_look_ = [] { return absl::UnavailableError("nccl: a peer is gone"); };
  Start();
  EXPECT_EQ(WaitForAbort(), absl::UnavailableError("nccl: a peer is gone"));
}

}  // namespace
}  // namespace epserve::runtime
