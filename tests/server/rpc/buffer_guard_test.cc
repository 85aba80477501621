#include "server/rpc/buffer_guard.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/loopback.h"

namespace epserve::server {
namespace {

constexpr std::uint64_t kMaxBytes = 60'000;

// Whose connections the guard has ended, in their order.
class Ended {
 public:
  BufferGuard::Limit limit() {
    return {kMaxBytes, [this](const std::string& peer, std::uint64_t) {
              const std::lock_guard lock(mutex_);
              peers_.push_back(peer);
              changed_.notify_all();
            }};
  }
  std::vector<std::string> WaitFor(std::size_t count) {
    std::unique_lock lock(mutex_);
    const bool came =
        changed_.wait_for(lock, std::chrono::seconds(20), [&] { return peers_.size() >= count; });
    EXPECT_TRUE(came) << peers_.size() << " connections were ended, not " << count;
    return peers_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> peers_;
};

class BufferGuardTest : public testing::Test {
 protected:
  static bool IsOpen(const LoopbackConnection& connection) {
    char byte = 0;
    return ::recv(connection.caller.get(), &byte, 1, MSG_DONTWAIT) < 0;  // It would have to wait.
  }

  LoopbackListener listener_;
  LoopbackConnection first_ = listener_.Connect();
  LoopbackConnection second_ = listener_.Connect();
  Ended ended_;
  BufferGuard guard_{{listener_.port()}, ended_.limit()};
};

TEST_F(BufferGuardTest, WhoHoldsMostIsEndedOnceAllHoldTooMuch) {
  const BufferGuard::Call first(&guard_, first_.peer);
  const BufferGuard::Call second(&guard_, second_.peer);
  first_.Send(25'000);
  second_.Send(40'000);
  EXPECT_EQ(ended_.WaitFor(1), std::vector{second_.peer});
  EXPECT_FALSE(IsOpen(second_));
  EXPECT_TRUE(IsOpen(first_));
}

TEST_F(BufferGuardTest, WhoseMessagesAreReadMaySendAnyAmount) {
  BufferGuard::Call first(&guard_, first_.peer);
  for (int i = 0; i < 10; ++i) {
    first_.Send(30'000);
    first.OnMessage(30'000);
  }
  const BufferGuard::Call second(&guard_, second_.peer);
  second_.Send(kMaxBytes + 1);
  EXPECT_EQ(ended_.WaitFor(1), std::vector{second_.peer});
  EXPECT_TRUE(IsOpen(first_));
}

TEST_F(BufferGuardTest, LaterMessageIsFoundWhileOthersCallsComeAndGo) {
  BufferGuard::Call stream(&guard_, first_.peer);
  stream.OnMessage(10);
  first_.Send(kMaxBytes + 100'000);
  std::atomic<bool> found = false;
  std::thread others([&] {
    while (!found) {
      BufferGuard::Call(&guard_, second_.peer).OnMessage(10);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));  // a caller's pace
    }
  });
  EXPECT_EQ(ended_.WaitFor(1), std::vector{first_.peer});
  found = true;
  others.join();
}

TEST_F(BufferGuardTest, LaterMessageOfAStreamIsWatchedToo) {
  BufferGuard::Call stream(&guard_, first_.peer);
  stream.OnMessage(10);
  first_.Send(kMaxBytes + 100'000);
  EXPECT_EQ(ended_.WaitFor(1), std::vector{first_.peer});
}

}  // namespace
}  // namespace epserve::server
