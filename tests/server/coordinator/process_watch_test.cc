#include "server/coordinator/process_watch.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <utility>

#include "gtest/gtest.h"

namespace epserve::coordinator {
namespace {

constexpr auto kLong = std::chrono::seconds(20);

// A child to watch, which says when it started and then lives until it is killed.
class ProcessWatchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    read_end_ = runtime::UniqueFd(ends[0]);
    hold_ = runtime::UniqueFd(ends[1]);
    child_ = ::fork();
    ASSERT_GE(child_, 0);
    if (child_ == 0) {
      const std::uint64_t ticks = server::OwnProcessIdentity().start_ticks;
      const bool told = ::write(hold_.get(), &ticks, sizeof(ticks)) == sizeof(ticks);
      while (told) ::pause();
      ::_exit(1);
    }
    identity_ = server::OwnProcessIdentity();
    identity_.pid = child_;
    ASSERT_EQ(::read(read_end_.get(), &identity_.start_ticks, sizeof(identity_.start_ticks)),
              static_cast<ssize_t>(sizeof(identity_.start_ticks)));
    auto watch = ProcessWatch::Start([this](const ProcessEnded& ended) {
      ++calls_;
      ended_.set_value(ended);
    });
    ASSERT_TRUE(watch.ok()) << watch.status();
    watch_ = *std::move(watch);
  }
  void TearDown() override {
    watch_.reset();
    Kill();
  }
  void Kill() {
    if (child_ <= 0) return;
    ::kill(child_, SIGKILL);
    ::waitpid(std::exchange(child_, -1), nullptr, 0);
  }

  pid_t child_ = -1;
  runtime::UniqueFd read_end_;
  runtime::UniqueFd hold_;
  server::ProcessIdentity identity_;
  std::promise<ProcessEnded> ended_;
  std::atomic<int> calls_{0};
  std::unique_ptr<ProcessWatch> watch_;
};

TEST_F(ProcessWatchTest, EndIsToldOnceHoweverOftenItWasAskedFor) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(watch_->Watch({"w1", "a"}, identity_).ok());
  std::future<ProcessEnded> ended = ended_.get_future();
  EXPECT_EQ(ended.wait_for(std::chrono::milliseconds(0)), std::future_status::timeout);
  Kill();
  ASSERT_EQ(ended.wait_for(kLong), std::future_status::ready);
  const ProcessEnded told = ended.get();
  EXPECT_EQ(told.worker_id, "w1");
  EXPECT_EQ(told.incarnation, "a");
  watch_->Stop();
  EXPECT_EQ(calls_, 1);
}

TEST_F(ProcessWatchTest, ProcessOfAnotherMachineIsRefused) {
  identity_.home = "another boot pid:[1]";
  EXPECT_EQ(watch_->Watch({"w1", "a"}, identity_).code(), absl::StatusCode::kNotFound);
  Kill();
  watch_->Stop();
  EXPECT_EQ(calls_, 0);
}

TEST_F(ProcessWatchTest, StopsWhileAProcessIsWatched) {
  ASSERT_TRUE(watch_->Watch({"w1", "a"}, identity_).ok());
  watch_->Stop();
  Kill();
  EXPECT_EQ(calls_, 0);
}

}  // namespace
}  // namespace epserve::coordinator
