#include "server/common/process_identity.h"

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <utility>

#include "gtest/gtest.h"
#include "runtime/base/unique_fd.h"

namespace epserve::server {
namespace {

// A child that says who it is, and then lives until it is killed.
class ProcessIdentityTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const runtime::UniqueFd read_end(ends[0]);
    const runtime::UniqueFd write_end(ends[1]);
    child_ = ::fork();
    ASSERT_GE(child_, 0);
    if (child_ == 0) {
      const ProcessIdentity own = OwnProcessIdentity();
      const bool told = ::write(write_end.get(), &own.start_ticks, sizeof(own.start_ticks)) ==
                        sizeof(own.start_ticks);
      while (told) ::pause();
      ::_exit(1);
    }
    identity_ = OwnProcessIdentity();
    identity_.pid = child_;
    ASSERT_EQ(::read(read_end.get(), &identity_.start_ticks, sizeof(identity_.start_ticks)),
              static_cast<ssize_t>(sizeof(identity_.start_ticks)));
    ASSERT_NE(identity_.home, "");
    ASSERT_GT(identity_.start_ticks, 0u);
  }
  void TearDown() override { Kill(); }

  void Kill() {
    if (child_ <= 0) return;
    ::kill(child_, SIGKILL);
    ::waitpid(std::exchange(child_, -1), nullptr, 0);
  }
  static bool Ended(const runtime::UniqueFd& process, int timeout_ms) {
    pollfd polled{process.get(), POLLIN, 0};
    return ::poll(&polled, 1, timeout_ms) == 1;
  }

  pid_t child_ = -1;
  ProcessIdentity identity_;
};

TEST_F(ProcessIdentityTest, DescriptorTellsOfTheEndAndNotOfAPause) {
  auto process = OpenProcess(identity_);
  ASSERT_TRUE(process.ok()) << process.status();
  ::kill(child_, SIGSTOP);
  siginfo_t info;
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(child_), &info, WSTOPPED), 0);
  EXPECT_FALSE(Ended(*process, 0));
  Kill();
  EXPECT_TRUE(Ended(*process, 10'000));
}

TEST_F(ProcessIdentityTest, OnlyTheVeryProcessIsFound) {
  ProcessIdentity elsewhere = identity_;
  elsewhere.home += "x";
  EXPECT_EQ(OpenProcess(elsewhere).status().code(), absl::StatusCode::kNotFound);
  ProcessIdentity unknown_home = identity_;
  unknown_home.home.clear();
  EXPECT_EQ(OpenProcess(unknown_home).status().code(), absl::StatusCode::kNotFound);
  ProcessIdentity earlier = identity_;
  --earlier.start_ticks;
  EXPECT_EQ(OpenProcess(earlier).status().code(), absl::StatusCode::kNotFound);
  ProcessIdentity no_process = identity_;
  for (const std::int64_t pid : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 32}) {
    no_process.pid = pid;
    EXPECT_EQ(OpenProcess(no_process).status().code(), absl::StatusCode::kNotFound) << pid;
  }
  Kill();
  EXPECT_EQ(OpenProcess(identity_).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace epserve::server
