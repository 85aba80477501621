#include "server/coordinator/front_door/shm_registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::Not;

constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint64_t kHalf = std::uint64_t{1} << 63;

ShmOptions Allowed() {
  ShmOptions options;
  options.allowed = true;
  return options;
}

void IgnoreRelease(const std::vector<std::uint64_t>&) {}

std::size_t NumOpenDescriptors() {
  std::size_t count = 0;
  for (int fd = 0; fd < 1024; ++fd) count += ::fcntl(fd, F_GETFD) != -1;
  return count;
}

TEST(ShmRegistryTest, EverythingIsUnimplementedNamingTheFlagWhereSwitchedOff) {
  ShmRegistry registry((ShmOptions()));
  const ShmObject object(64);
  bool released = false;
  const absl::Status statuses[] = {
      registry.Register("a", object.key(), 0, 64), registry.Find("a").status(),
      registry.List(ShmKind::kSystem, "").status(),
      registry.Unregister(ShmKind::kSystem, "", [&](const auto&) { released = true; })};
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
    EXPECT_THAT(std::string(status.message()), HasSubstr("--allow-client-shm"));
  }
  EXPECT_FALSE(released);
}

TEST(ShmRegistryTest, RegisteredRegionReadsAndWritesTheClientsBytesAtItsOffset) {
  ShmRegistry registry(Allowed());
  ShmObject object(64);
  object.Write(0, std::string(64, '.'));
  object.Write(20, "hello");
  ASSERT_TRUE(registry.Register("a", "/" + object.key(), 16, 32).ok());
  const auto region = registry.Find("a");
  ASSERT_TRUE(region.ok());
  std::string bytes(5, '\0');
  ASSERT_TRUE((*region)->Read(4, bytes).ok());
  EXPECT_EQ(bytes, "hello");
  ASSERT_TRUE((*region)->Write(27, std::string("WORLD")).ok());
  EXPECT_EQ(object.Read(42, 7), ".WORLD.");
}

TEST(ShmRegistryTest, WindowsAreHeldToTheRegionAtEveryEdge) {
  ShmRegistry registry(Allowed());
  ShmObject object(100);
  ASSERT_TRUE(registry.Register("a", object.key(), 10, 50).ok());
  const auto region = registry.Find("a").value();
  struct Window {
    std::uint64_t offset, size;
    bool fits;
  };
  for (const Window& window : std::vector<Window>{{0, 50, true},
                                                  {0, 0, true},
                                                  {50, 0, true},
                                                  {49, 1, true},
                                                  {25, 25, true},
                                                  {0, 51, false},
                                                  {1, 50, false},
                                                  {50, 1, false},
                                                  {51, 0, false},
                                                  {kHalf, 1, false},
                                                  {1, kHalf, false},
                                                  {kHalf, kHalf, false},
                                                  {kMax, 1, false},
                                                  {1, kMax, false},
                                                  {kMax, kMax, false},
                                                  {kMax - 49, 50, false},
                                                  {kMax, 0, false}}) {
    const absl::Status status = region->CheckWindow(window.offset, window.size);
    EXPECT_EQ(status.ok(), window.fits) << window.offset << " + " << window.size << ": " << status;
    if (window.fits) continue;
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("50 bytes"));
  }
}

TEST(ShmRegistryTest, RegistrationIsHeldToTheObjectAtEveryEdge) {
  ShmRegistry registry(Allowed());
  const ShmObject object(100);
  struct Window {
    std::uint64_t offset, size;
    bool fits;
  };
  for (const Window& window : std::vector<Window>{{0, 100, true},
                                                  {99, 1, true},
                                                  {0, 0, false},
                                                  {0, 101, false},
                                                  {1, 100, false},
                                                  {100, 1, false},
                                                  {kMax, 1, false},
                                                  {1, kMax, false},
                                                  {kMax, kMax, false},
                                                  {kHalf, kHalf, false},
                                                  {kMax - 99, 100, false}}) {
    const absl::Status status = registry.Register("a", object.key(), window.offset, window.size);
    EXPECT_EQ(status.ok(), window.fits) << window.offset << " + " << window.size << ": " << status;
    if (!window.fits) {
      // A size past the cap on all regions is told as that.
      EXPECT_TRUE(status.code() == StatusCode::kInvalidArgument ||
                  status.code() == StatusCode::kResourceExhausted)
          << status;
    }
    ASSERT_TRUE(registry.Unregister(ShmKind::kSystem, "", IgnoreRelease).ok());
  }
}

TEST(ShmRegistryTest, TruncationAfterRegistrationIsAnErrorAndNoCrash) {
  ShmRegistry registry(Allowed());
  ShmObject object(3 * 4096);
  ASSERT_TRUE(registry.Register("a", object.key(), 0, 3 * 4096).ok());
  const auto region = registry.Find("a").value();
  object.Truncate(4096);
  std::string bytes(8192, 'x');
  const absl::Status read = region->Read(0, bytes);
  EXPECT_EQ(read.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(read.message()), HasSubstr("truncated"));
  EXPECT_THAT(std::string(read.message()), HasSubstr("8192 bytes of its object are needed, 4096"));
  EXPECT_EQ(region->Write(0, bytes).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(object.size(), 4096u) << "a refused write must not grow the object again";
  bytes.resize(4096);
  EXPECT_TRUE(region->Read(0, bytes).ok()) << "what is left can still be read";
}

TEST(ShmRegistryTest, TruncationWhileReadingNeverCrashes) {
  ShmRegistry registry(Allowed());
  constexpr std::size_t kBytes = 1 << 20;
  ShmObject object(kBytes);
  ASSERT_TRUE(registry.Register("a", object.key(), 0, kBytes).ok());
  const auto region = registry.Find("a").value();
  std::atomic<bool> stop{false};
  std::thread truncater([&] {
    while (!stop.load()) {
      object.Truncate(100);
      object.Truncate(kBytes);
    }
  });
  std::string bytes(kBytes, '\0');
  for (int i = 0; i < 300; ++i) {
    const absl::Status read = region->Read(0, bytes);
    EXPECT_TRUE(read.ok() || read.code() == StatusCode::kInvalidArgument) << read;
    const absl::Status written = region->Write(0, bytes);
    EXPECT_TRUE(written.ok() || written.code() == StatusCode::kInvalidArgument) << written;
  }
  stop.store(true);
  truncater.join();
}

TEST(ShmRegistryTest, KeysOutsideTheRulesAreRefusedWithoutShowingThem) {
  ShmRegistry registry(Allowed());
  const ShmObject object(64);
  for (const std::string key : {"", "/", "///", ".", "..", "/..", "sem.secret", "/sem.secret",
                                "epserve-secret", "a/secret", "../secret", "secret key", "secret\n",
                                "s\xc3\xa9"
                                "cret",
                                "secret%"}) {
    const absl::Status status = registry.Register("a", key, 0, 64);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << key;
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("secret"))) << key;
  }
  EXPECT_EQ(registry.Register("a", std::string(256, 'k'), 0, 64).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(registry.Register("a", std::string("front\0door", 10), 0, 64).code(),
            StatusCode::kInvalidArgument);
}

TEST(ShmRegistryTest, LeadingSlashesAreStrippedBeforeThePrefixCheck) {
  ShmOptions options = Allowed();
  options.key_prefixes = {"tensors-", "front-door-allowed"};
  ShmRegistry registry(options);
  const ShmObject allowed(64, "front-door-allowed");
  const ShmObject other(64, "front-door-other");
  EXPECT_TRUE(registry.Register("a", "//" + allowed.key(), 0, 64).ok());
  const absl::Status status = registry.Register("b", "/" + other.key(), 0, 64);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("prefixes"));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("front-door")));
}

TEST(ShmRegistryTest, ObjectThatDoesNotExistIsNotFoundWithoutItsKey) {
  ShmRegistry registry(Allowed());
  const absl::Status status = registry.Register("a", "/front-door-secret-absent", 0, 64);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'a'"));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("secret")));
}

TEST(ShmRegistryTest, WhatIsNoRegularFileIsRefusedWithoutBlocking) {
  ShmRegistry registry(Allowed());
  const std::string stem = "front-door-test-" + std::to_string(::getpid());
  const std::string fifo = "/dev/shm/" + stem + "-fifo";
  const std::string link = "/dev/shm/" + stem + "-link";
  const std::string directory = "/dev/shm/" + stem + "-dir";
  const ShmObject object(64);
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  ASSERT_EQ(::symlink(("/dev/shm/" + object.key()).c_str(), link.c_str()), 0);
  ASSERT_EQ(::mkdir(directory.c_str(), 0700), 0);
  for (const char* kind : {"-fifo", "-link", "-dir"}) {
    const absl::Status status = registry.Register("a", stem + kind, 0, 64);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << kind << ": " << status;
  }
  ::unlink(fifo.c_str());
  ::unlink(link.c_str());
  ::rmdir(directory.c_str());
}

TEST(ShmRegistryTest, ObjectOfAnotherUserIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a file to another user";
  ShmRegistry registry(Allowed());
  const ShmObject object(64);
  ASSERT_EQ(::chown(("/dev/shm/" + object.key()).c_str(), 65534, 65534), 0);
  EXPECT_EQ(registry.Register("a", object.key(), 0, 64).code(), StatusCode::kPermissionDenied);
}

TEST(ShmRegistryTest, NameInUseAlreadyExistsButTwoNamesMayShareAKey) {
  ShmRegistry registry(Allowed());
  const ShmObject object(64);
  ASSERT_TRUE(registry.Register("a", object.key(), 0, 64).ok());
  EXPECT_EQ(registry.Register("a", object.key(), 0, 64).code(), StatusCode::kAlreadyExists);
  EXPECT_TRUE(registry.Register("b", object.key(), 32, 32).ok());
}

TEST(ShmRegistryTest, RegionsAndBytesAreCapped) {
  ShmOptions options = Allowed();
  options.max_regions = 2;
  options.max_total_bytes = 100;
  ShmRegistry registry(options);
  const ShmObject object(200);
  ASSERT_TRUE(registry.Register("a", object.key(), 0, 60).ok());
  const absl::Status bytes = registry.Register("b", object.key(), 0, 41);
  EXPECT_EQ(bytes.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(bytes.message()), HasSubstr("41 bytes, on top of 60"));
  ASSERT_TRUE(registry.Register("b", object.key(), 0, 40).ok());
  ASSERT_TRUE(registry.Unregister(ShmKind::kSystem, "b", IgnoreRelease).ok());
  ASSERT_TRUE(registry.Register("b", object.key(), 0, 1).ok());
  const absl::Status count = registry.Register("c", object.key(), 0, 1);
  EXPECT_EQ(count.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(count.message()), HasSubstr("2 regions"));
}

TEST(ShmRegistryTest, WindowPastEveryFilesEndIsInvalidBeforeAnyCapIsLookedAt) {
  ShmOptions options = Allowed();
  options.max_total_bytes = 100;
  ShmRegistry registry(options);
  const ShmObject object(64);
  constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();
  for (const auto& [offset, size] : {std::pair{std::uint64_t{1}, kMax}, std::pair{kMax, kMax},
                                     std::pair{kMax / 2, std::uint64_t{101}}}) {
    const absl::Status status = registry.Register("a", object.key(), offset, size);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status;
  }
}

TEST(ShmRegistryTest, NamesOutsideTheRulesAreRefused) {
  ShmRegistry registry(Allowed());
  const ShmObject object(64);
  EXPECT_EQ(registry.Register("", object.key(), 0, 64).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(registry.Register(std::string(257, 'n'), object.key(), 0, 64).code(),
            StatusCode::kInvalidArgument);
}

TEST(ShmRegistryTest, ListGivesOneOrAllAndNotFoundForAnUnknownName) {
  ShmRegistry registry(Allowed());
  const ShmObject object(64);
  EXPECT_TRUE(registry.List(ShmKind::kSystem, "")->empty());
  ASSERT_TRUE(registry.Register("b", "/" + object.key(), 8, 16).ok());
  ASSERT_TRUE(registry.Register("a", object.key(), 0, 64).ok());
  const auto all = registry.List(ShmKind::kSystem, "").value();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].name, "a");
  const auto one = registry.List(ShmKind::kSystem, "b").value();
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].key, "/" + object.key());
  EXPECT_EQ(one[0].offset_bytes, 8u);
  EXPECT_EQ(one[0].size_bytes, 16u);
  EXPECT_EQ(registry.List(ShmKind::kSystem, "c").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(registry.Find("c").status().code(), StatusCode::kNotFound);
}

TEST(ShmRegistryTest, UnregisterOfAnUnknownNameIsOkAndReleasedAtOnce) {
  ShmRegistry registry(Allowed());
  int released = 0;
  EXPECT_TRUE(
      registry.Unregister(ShmKind::kSystem, "nothing", [&](const auto&) { ++released; }).ok());
  EXPECT_TRUE(registry.Unregister(ShmKind::kSystem, "", [&](const auto&) { ++released; }).ok());
  EXPECT_EQ(released, 2);
}

TEST(ShmRegistryTest, UnregisterInUseTakesTheNameAtOnceAndReportsAfterTheLastUser) {
  ShmRegistry registry(Allowed());
  ShmObject object(64);
  ShmObject next(64);
  ASSERT_TRUE(registry.Register("a", object.key(), 0, 64).ok());
  auto first_user = registry.Find("a").value();
  auto second_user = first_user;
  int released = 0;
  ASSERT_TRUE(registry.Unregister(ShmKind::kSystem, "a", [&](const auto&) { ++released; }).ok());
  EXPECT_EQ(registry.Find("a").status().code(), StatusCode::kNotFound);
  // The name is free at once, and what is registered by it now is not what the users hold.
  ASSERT_TRUE(registry.Register("a", next.key(), 0, 64).ok());
  ASSERT_TRUE(second_user->Write(0, std::string("old")).ok());
  EXPECT_EQ(object.Read(0, 3), "old");
  EXPECT_EQ(next.Read(0, 3), std::string(3, '\0'));
  first_user.reset();
  EXPECT_EQ(released, 0);
  second_user.reset();
  EXPECT_EQ(released, 1);
}

TEST(ShmRegistryTest, UnregisterOfAllReportsOnceAfterTheLastRegion) {
  ShmRegistry registry(Allowed());
  const ShmObject object(64);
  ASSERT_TRUE(registry.Register("a", object.key(), 0, 64).ok());
  ASSERT_TRUE(registry.Register("b", object.key(), 0, 64).ok());
  auto user = registry.Find("b").value();
  int released = 0;
  ASSERT_TRUE(registry.Unregister(ShmKind::kSystem, "", [&](const auto&) { ++released; }).ok());
  EXPECT_TRUE(registry.List(ShmKind::kSystem, "")->empty());
  EXPECT_EQ(released, 0);
  user.reset();
  EXPECT_EQ(released, 1);
}

TEST(ShmRegistryTest, DescriptorsAreGivenBack) {
  const ShmObject object(64);
  ShmRegistry registry(Allowed());
  const std::size_t before = NumOpenDescriptors();
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(registry.Register("a", object.key(), 0, 64).ok());
    EXPECT_FALSE(registry.Register("b", object.key(), 1, 64).ok());
    auto user = registry.Find("a").value();
    ASSERT_TRUE(registry.Unregister(ShmKind::kSystem, "a", IgnoreRelease).ok());
    EXPECT_EQ(NumOpenDescriptors(), before + 1);
  }
  EXPECT_EQ(NumOpenDescriptors(), before);
}

}  // namespace
}  // namespace epserve::coordinator
