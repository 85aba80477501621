#include "server/common/file_watcher.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace epserve::server {
namespace {

constexpr std::chrono::milliseconds kPeriod{5};

// A file, and a loader that takes in what it holds unless that is "bad".
class FileWatcherTest : public testing::Test {
 protected:
  FileWatcherTest() : path_(absl::StrCat(testing::TempDir(), "/watched-", ::getpid())) {}
  ~FileWatcherTest() override { std::remove(path_.c_str()); }

  // Renamed into place, as those do it who renew certificates.
  void Write(const std::string& content) {
    const std::string next = path_ + ".next";
    std::ofstream(next) << content;
    ASSERT_EQ(std::rename(next.c_str(), path_.c_str()), 0);
  }

  absl::Status Load() {
    std::ifstream file(path_);
    const std::string content{std::istreambuf_iterator<char>(file), {}};
    const std::lock_guard lock(mutex_);
    ++loads_;
    changed_.notify_all();
    if (content == "bad") return absl::InvalidArgumentError("bad");
    taken_ = content;
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<FileWatcher>> Start() {
    return FileWatcher::Start(
        {path_, ""}, [this] { return Load(); }, kPeriod);
  }

  bool Becomes(const std::string& content) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return taken_ == content; });
  }
  bool LoadsReach(int loads) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return loads_ >= loads; });
  }
  std::string taken() {
    const std::lock_guard lock(mutex_);
    return taken_;
  }

 private:
  const std::string path_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string taken_;  // Guarded by mutex_.
  int loads_ = 0;      // Guarded by mutex_.
};

TEST_F(FileWatcherTest, ReplacedFileIsTakenIn) {
  Write("one");
  const auto watcher = Start();
  ASSERT_TRUE(watcher.ok()) << watcher.status();
  EXPECT_EQ(taken(), "one");
  Write("two");
  EXPECT_TRUE(Becomes("two"));
}

TEST_F(FileWatcherTest, BadFileKeepsWhatWasTakenInUntilItIsGood) {
  Write("one");
  const auto watcher = Start();
  ASSERT_TRUE(watcher.ok());
  Write("bad");
  EXPECT_TRUE(LoadsReach(3)) << "it is tried again";
  EXPECT_EQ(taken(), "one");
  Write("two");
  EXPECT_TRUE(Becomes("two"));
}

TEST_F(FileWatcherTest, FirstLoadsErrorIsReturned) {
  Write("bad");
  EXPECT_EQ(Start().status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace epserve::server
