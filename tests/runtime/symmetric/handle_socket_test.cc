#include "runtime/symmetric/handle_socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <latch>
#include <thread>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

std::string Address(int rank) {
  return HandleSocketAddress("", absl::StrCat("test", getpid()), 7, rank);
}

UniqueFd MemoryWith(const char* text) {
  UniqueFd fd(memfd_create("handle", MFD_CLOEXEC));
  EXPECT_EQ(write(fd.get(), text, std::strlen(text)), static_cast<ssize_t>(std::strlen(text)));
  return fd;
}

TEST(HandleSocketTest, FetchedDescriptorReachesTheServersMemory) {
  auto server = HandleServer::Start(Address(0), "secret", MemoryWith("heap of rank 0"), 4096);
  ASSERT_TRUE(server.ok()) << server.status();
  for (int i = 0; i < 3; ++i) {
    auto fetched = FetchHandle(Address(0), "secret", absl::Seconds(5));
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_EQ(fetched->bytes, 4096u);
    char text[32] = {};
    ASSERT_GT(pread(fetched->descriptor.get(), text, sizeof(text) - 1, 0), 0);
    EXPECT_STREQ(text, "heap of rank 0");
  }
}

TEST(HandleSocketTest, DescriptorsAreHandedOutByTheirNumbers) {
  const UniqueFd first = MemoryWith("first");
  const UniqueFd second = MemoryWith("second");
  const auto offer = [&](std::uint64_t id) -> absl::StatusOr<OfferedHandle> {
    if (id != 1 && id != 2) return absl::NotFoundError("no such number");
    UniqueFd copy(::dup(id == 1 ? first.get() : second.get()));
    return OfferedHandle{std::move(copy), id * 100};
  };
  auto server = HandleServer::Start(Address(7), "secret", offer);
  ASSERT_TRUE(server.ok()) << server.status();
  for (const auto& [id, text] : {std::pair{1u, "first"}, std::pair{2u, "second"}}) {
    const auto fetched = FetchHandle(Address(7), "secret", id, absl::Seconds(5));
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_EQ(fetched->bytes, id * 100);
    std::string content(16, '\0');
    const ssize_t got = ::pread(fetched->descriptor.get(), content.data(), content.size(), 0);
    ASSERT_GT(got, 0);
    EXPECT_EQ(content.substr(0, std::string(text).size()), text);
  }
  EXPECT_EQ(FetchHandle(Address(7), "secret", 3, absl::Seconds(5)).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(FetchHandle(Address(7), "wrong", 1, absl::Seconds(5)).status().code(),
            absl::StatusCode::kPermissionDenied)
      << "the secret comes first";
}

TEST(HandleSocketTest, SignalsInterruptNoFetch) {
  struct sigaction before {};
  struct sigaction nothing {};
  nothing.sa_handler = [](int) {};
  ASSERT_EQ(::sigaction(SIGUSR1, &nothing, &before), 0);
  std::latch asked(1);
  std::latch answer(1);
  const auto offer = [&](std::uint64_t) -> absl::StatusOr<OfferedHandle> {
    asked.count_down();
    answer.wait();
    return OfferedHandle{MemoryWith("late"), 4};
  };
  const auto server = HandleServer::Start(Address(8), "secret", offer);
  ASSERT_TRUE(server.ok()) << server.status();
  absl::StatusOr<OfferedHandle> fetched;
  std::thread caller([&] { fetched = FetchHandle(Address(8), "secret", absl::Seconds(60)); });
  asked.wait();
  for (int i = 0; i < 100; ++i) {
    ::pthread_kill(caller.native_handle(), SIGUSR1);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  answer.count_down();
  caller.join();
  EXPECT_TRUE(fetched.ok()) << fetched.status();
  ::sigaction(SIGUSR1, &before, nullptr);
}

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

TEST(HandleSocketTest, CallerThatCannotBeTakenInIsAnsweredLaterAndKeepsNoCoreBusy) {
  const auto server = HandleServer::Start(Address(9), "secret", MemoryWith("x"), 1);
  ASSERT_TRUE(server.ok()) << server.status();
  absl::StatusOr<OfferedHandle> fetched;
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  {
    const UniqueFd caller(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    rlimit none_left = limit;
    const UniqueFd next(::dup(caller.get()));
    none_left.rlim_cur = static_cast<rlim_t>(next.get());
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path + 1, Address(9).data() + 1, Address(9).size() - 1);
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + Address(9).size());
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none_left), 0);
    const double began = CpuSeconds();
    EXPECT_EQ(::connect(caller.get(), reinterpret_cast<sockaddr*>(&name), length), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    EXPECT_LT(CpuSeconds() - began, 0.05);
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  fetched = FetchHandle(Address(9), "secret", absl::Seconds(20));
  EXPECT_TRUE(fetched.ok()) << fetched.status();
}

TEST(HandleSocketTest, WrongSecretIsRefusedAndTheServerLivesOn) {
  auto server = HandleServer::Start(Address(1), "right", MemoryWith("x"), 1);
  ASSERT_TRUE(server.ok()) << server.status();
  const auto refused = FetchHandle(Address(1), "wrong", absl::Seconds(5));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kPermissionDenied) << refused.status();
  EXPECT_TRUE(FetchHandle(Address(1), "right", absl::Seconds(5)).ok());
}

TEST(HandleSocketTest, NobodyServingIsUnavailable) {
  const auto fetched = FetchHandle(Address(2), "secret", absl::Seconds(5));
  EXPECT_EQ(fetched.status().code(), absl::StatusCode::kUnavailable) << fetched.status();
}

TEST(HandleSocketTest, ServerThatEndsInsteadOfAnsweringIsUnavailable) {
  const UniqueFd listener(socket(AF_UNIX, SOCK_STREAM, 0));
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const std::string address = Address(8);
  std::memcpy(name.sun_path + 1, address.data() + 1, address.size() - 1);
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
  ASSERT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&name), length), 0);
  ASSERT_EQ(listen(listener.get(), 1), 0);
  for (const bool reads : {true, false}) {
    std::thread dying([&] {
      const UniqueFd caller(accept(listener.get(), nullptr, nullptr));
      char request[72];
      if (!reads) return;
      EXPECT_EQ(recv(caller.get(), request, sizeof(request), MSG_WAITALL), 72);
    });
    const auto fetched = FetchHandle(address, "secret", absl::Seconds(5));
    dying.join();
    EXPECT_EQ(fetched.status().code(), absl::StatusCode::kUnavailable) << fetched.status();
  }
}

TEST(HandleSocketTest, AddressInUseIsRefused) {
  for (const std::string& address :
       {Address(3), HandleSocketAddress("/tmp", absl::StrCat("in-use", getpid()), 7, 4)}) {
    auto first = HandleServer::Start(address, "s", MemoryWith("x"), 1);
    ASSERT_TRUE(first.ok());
    const auto second = HandleServer::Start(address, "s", MemoryWith("x"), 1);
    EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists) << second.status();
    EXPECT_TRUE(FetchHandle(address, "s", absl::Seconds(5)).ok()) << "the first is none the worse";
  }
}

TEST(HandleSocketTest, SocketThatAppearsIsNeverTakenForADeadOnes) {
  std::string directory = "/tmp/epserve-sockets-XXXXXX";
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  std::atomic<bool> ended = false;
  std::thread reclaimer([&] {
    while (!ended) EXPECT_EQ(ReclaimStaleSockets(directory, "mine").value_or(-1), 0);
  });
  for (int i = 0; i < 2000; ++i) {
    auto server =
        HandleServer::Start(HandleSocketAddress(directory, "mine", 7, 1), "s", MemoryWith("x"), 1);
    EXPECT_TRUE(server.ok()) << server.status();
  }
  ended = true;
  reclaimer.join();
  rmdir(directory.c_str());
}

TEST(HandleSocketTest, PathFormIsRemovedWithItsServer) {
  const std::string address = HandleSocketAddress("/tmp", absl::StrCat("test", getpid()), 7, 4);
  {
    auto server = HandleServer::Start(address, "s", MemoryWith("x"), 1);
    ASSERT_TRUE(server.ok()) << server.status();
    EXPECT_TRUE(FetchHandle(address, "s", absl::Seconds(5)).ok());
  }
  struct stat info;
  EXPECT_NE(stat(address.c_str(), &info), 0);
}

TEST(HandleSocketTest, SocketsOfTheDeadAreReclaimedAndNoOthers) {
  std::string directory = "/tmp/epserve-sockets-XXXXXX";
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  // Bound and closed: what a killed worker leaves.
  const auto abandon = [&](const std::string& cluster, const std::string& suffix) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    const std::string path = HandleSocketAddress(directory, cluster, 7, 1) + suffix;
    std::memcpy(name.sun_path, path.data(), path.size());
    const UniqueFd fd(socket(AF_UNIX, SOCK_STREAM, 0));
    EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
    return path;
  };
  const std::string dead = abandon("mine", "");
  const std::string other = abandon("mine-too", "");
  const std::string stranger = abandon("mine", ".bak");
  const std::string alive = HandleSocketAddress(directory, "mine", 7, 2);
  auto server = HandleServer::Start(alive, "s", MemoryWith("x"), 1);
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string given_up = abandon("mine", "~77");
  const std::string starting = abandon("mine", "~78");
  const timespec long_ago[2] = {{1, 0}, {1, 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, given_up.c_str(), long_ago, 0), 0);
  const auto reclaimed = ReclaimStaleSockets(directory, "mine");
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  EXPECT_EQ(*reclaimed, 2);
  struct stat info;
  EXPECT_NE(stat(given_up.c_str(), &info), 0);
  EXPECT_EQ(stat(starting.c_str(), &info), 0);
  unlink(starting.c_str());
  EXPECT_NE(stat(dead.c_str(), &info), 0);
  EXPECT_EQ(stat(other.c_str(), &info), 0);
  EXPECT_EQ(stat(stranger.c_str(), &info), 0);
  EXPECT_TRUE(FetchHandle(alive, "s", absl::Seconds(5)).ok());
  EXPECT_EQ(ReclaimStaleSockets(directory + "/none", "mine").status().code(),
            absl::StatusCode::kNotFound);
  server->reset();
  unlink(other.c_str());
  unlink(stranger.c_str());
  rmdir(directory.c_str());
}

TEST(HandleSocketTest, OverlongNamesAndSecretsAreRefused) {
  EXPECT_EQ(
      HandleServer::Start("@" + std::string(200, 'a'), "s", MemoryWith("x"), 1).status().code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      HandleServer::Start(Address(5), std::string(65, 's'), MemoryWith("x"), 1).status().code(),
      absl::StatusCode::kInvalidArgument);
}

TEST(HandleSocketTest, CallerThatSaysNothingHoldsNobodyForLong) {
  auto server = HandleServer::Start(Address(6), "s", MemoryWith("x"), 1);
  ASSERT_TRUE(server.ok());
  const UniqueFd silent(socket(AF_UNIX, SOCK_STREAM, 0));
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const std::string address = Address(6);
  std::memcpy(name.sun_path, address.data(), address.size());
  name.sun_path[0] = '\0';
  ASSERT_EQ(connect(silent.get(), reinterpret_cast<sockaddr*>(&name),
                    static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size())),
            0);
  EXPECT_TRUE(FetchHandle(Address(6), "s", absl::Seconds(10)).ok());
}

}  // namespace
}  // namespace epserve::runtime
