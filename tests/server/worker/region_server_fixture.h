// A stand-in for the coordinator's region server: memory objects under numbers.
#ifndef EPSERVE_TESTS_SERVER_WORKER_REGION_SERVER_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_WORKER_REGION_SERVER_FIXTURE_H_

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/unique_fd.h"
#include "runtime/symmetric/handle_socket.h"

namespace epserve::worker {

class FakeRegionServer {
 public:
  static constexpr char kSecret[] = "secret";

  FakeRegionServer() {
    static std::atomic<int> next{0};
    address_ =
        runtime::HandleSocketAddress("", absl::StrCat("regions", ::getpid()), 1, next.fetch_add(1));
    auto server = runtime::HandleServer::Start(
        address_, kSecret, [this](std::uint64_t id) -> absl::StatusOr<runtime::OfferedHandle> {
          const std::lock_guard lock(mutex_);
          const auto it = objects_.find(id);
          if (it == objects_.end()) return absl::NotFoundError("no region");
          ++num_fetched;
          return runtime::OfferedHandle{runtime::UniqueFd(::dup(it->second.get())), 0};
        });
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  const std::string& address() const { return address_; }

  void Add(std::uint64_t id, const std::string& content) {
    runtime::UniqueFd fd(::memfd_create("region", MFD_CLOEXEC));
    EXPECT_EQ(::pwrite(fd.get(), content.data(), content.size(), 0),
              static_cast<ssize_t>(content.size()));
    const std::lock_guard lock(mutex_);
    objects_[id] = std::move(fd);
  }
  std::string Content(std::uint64_t id) const {
    std::string content(1 << 16, '\0');
    const std::lock_guard lock(mutex_);
    const ssize_t got = ::pread(objects_.at(id).get(), content.data(), content.size(), 0);
    content.resize(got < 0 ? 0 : static_cast<std::size_t>(got));
    return content;
  }
  void Truncate(std::uint64_t id, std::size_t size) {
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(::ftruncate(objects_.at(id).get(), static_cast<off_t>(size)), 0);
  }

  std::atomic<int> num_fetched{0};

 private:
  mutable std::mutex mutex_;
  std::map<std::uint64_t, runtime::UniqueFd> objects_;  // Guarded by mutex_.
  std::string address_;
  std::unique_ptr<runtime::HandleServer> server_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_TESTS_SERVER_WORKER_REGION_SERVER_FIXTURE_H_
