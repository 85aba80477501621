#include "client/command/readiness_watch.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/safetensors_file.h"
#include "gtest/gtest.h"
#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

TEST(ReadinessWatchTest, ShowsAServiceThatIsReady) {
  FakeService service;
  const ReadinessWatch watch(service.target());
  const absl::Time end = absl::Now() + absl::Seconds(60);
  while (!watch.Latest().ready && absl::Now() < end) absl::SleepFor(absl::Milliseconds(5));
  const ReadinessSnapshot latest = watch.Latest();
  EXPECT_TRUE(latest.ready);
  ASSERT_TRUE(latest.cluster);
  EXPECT_EQ(latest.cluster->epoch, 42u);
}

TEST(ReadinessWatchTest, ServerThatStaysAwayIsTriedSeveralTimesASecond) {
  // Takes connections and closes them, as no server would.
  const FileHandle listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(listener.get(), 16), 0);
  ASSERT_EQ(getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  const ReadinessWatch watch(absl::StrCat("127.0.0.1:", ntohs(address.sin_port)));
  // By the eighth attempt a backoff that grows has grown.
  absl::Duration least = absl::InfiniteDuration();
  absl::Time last = absl::InfinitePast();
  for (int attempt = 1; attempt <= 12; ++attempt) {
    const FileHandle connection(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    ASSERT_GE(connection.get(), 0);
    const absl::Time now = absl::Now();
    if (attempt > 8) least = std::min(least, now - last);
    last = now;
  }
  EXPECT_LT(least, absl::Milliseconds(500));
  EXPECT_FALSE(watch.Latest().ready);
}

}  // namespace
}  // namespace epserve::client
