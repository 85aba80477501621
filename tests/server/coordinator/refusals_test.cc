#include "server/coordinator/refusals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <vector>

#include "runtime/base/log.h"

namespace epserve::coordinator {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class RefusalsTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(runtime::InitLog("refusals_test", "info", "text").ok()); }

  // What is logged of a handshake that has failed with one of `peers`.
  std::string LogOfHandshake(const std::string& cause, const std::vector<std::string>& peers) {
    return LogOf([&] {
      refusals_.OnHandshake(
          cause, [&] { return peers; }, now_);
    });
  }

  template <typename Refuse>
  static std::string LogOf(Refuse refuse) {
    ::testing::internal::CaptureStderr();
    refuse();
    runtime::FlushLog();
    return ::testing::internal::GetCapturedStderr();
  }

  Metrics metrics_{1};
  Refusals refusals_{&metrics_};
  Refusals::TimePoint now_ = std::chrono::steady_clock::now();
};

TEST_F(RefusalsTest, EveryCallIsCountedAndEachHostLoggedOnce) {
  const auto refuse = [&](const std::string& peer) {
    return LogOf([&] { refusals_.OnMaxConnections(peer); });
  };
  EXPECT_THAT(refuse("ipv4:192.0.2.1:1"), HasSubstr("connection_refused peer=ipv4:192.0.2.1:1"));
  EXPECT_EQ(refuse("ipv4:192.0.2.1:2"), "");
  EXPECT_THAT(refuse("ipv4:192.0.2.2:1"), HasSubstr("peer=ipv4:192.0.2.2:1"));
  EXPECT_THAT(metrics_.Render(),
              HasSubstr("epserve_refused_total{reason=\"max_connections\"} 3\n"));
}

TEST_F(RefusalsTest, CallerOfManyAddressesDoesNotSilenceOthers) {
  std::string log = LogOf([&] {
    for (int i = 0; i < 3000; ++i) {
      refusals_.OnMaxConnections("ipv6:%5B2001:db8::" + std::to_string(i) + "%5D:1");
    }
  });
  EXPECT_EQ(log.find("connection_refused"), log.rfind("connection_refused")) << "one network";
  log = LogOf([&] { refusals_.OnMaxConnections("ipv6:%5B2001:db8:1::1%5D:1"); });
  EXPECT_THAT(log, HasSubstr("connection_refused"));
}

TEST_F(RefusalsTest, RefusedCallIsLoggedOncePerMethodAndHost) {
  const absl::Status status = absl::UnauthenticatedError("who");
  const auto refuse = [&](const std::string& method, const std::string& peer) {
    return LogOf([&] { refusals_.OnAccess(method, peer, status); });
  };
  EXPECT_THAT(refuse("/a/B", "ipv4:192.0.2.1:1"), HasSubstr("call_refused method=/a/B"));
  EXPECT_EQ(refuse("/a/B", "ipv4:192.0.2.1:2"), "");
  EXPECT_THAT(refuse("/a/C", "ipv4:192.0.2.1:2"), HasSubstr("method=/a/C"));
  EXPECT_THAT(metrics_.Render(), HasSubstr("epserve_refused_total{reason=\"access\"} 3\n"));
}

TEST_F(RefusalsTest, WorkerIsLoggedOncePerReasonAndHostWhateverItIsCalled) {
  const auto refuse = [&](Refusals::Worker what, const std::string& id, const std::string& peer,
                          const std::string& why) {
    HelloInfo hello;
    hello.worker_id = id;
    hello.peer = peer;
    return LogOf([&] {
      refusals_.OnWorker(what, hello, absl::InvalidArgumentError("join: worker " + id + why));
    });
  };
  const auto rejected = Refusals::Worker::kRejected;
  EXPECT_THAT(refuse(rejected, "host-11", "ipv4:192.0.2.1:1", " has slots 5"),
              HasSubstr("worker_rejected worker=host-11"));
  EXPECT_EQ(refuse(rejected, "host-12", "ipv4:192.0.2.1:2", " has slots 5"), "");
  EXPECT_THAT(refuse(rejected, "host-13", "ipv4:192.0.2.1:3", " has slots 6"),
              HasSubstr("has slots 6"));
  EXPECT_THAT(refuse(rejected, "host-14", "ipv4:192.0.2.2:1", " has slots 5"),
              HasSubstr("peer=ipv4:192.0.2.2:1"));
  EXPECT_THAT(refuse(Refusals::Worker::kTurnedAway, "w0", "ipv4:192.0.2.1:4", " is there"),
              HasSubstr("worker_turned_away worker=w0"));
  EXPECT_THAT(metrics_.Render(), HasSubstr("epserve_refused_total{reason=\"worker\"} 5\n"));
}

TEST_F(RefusalsTest, HandshakesPeerIsNamedWhereItIsKnownAndLoggedOncePerCause) {
  EXPECT_THAT(LogOfHandshake("expired", {"ipv4:192.0.2.1:1"}),
              HasSubstr("tls_handshake_refused peer=ipv4:192.0.2.1:1 cause=expired"));
  EXPECT_EQ(LogOfHandshake("expired", {"ipv4:192.0.2.1:2", "ipv4:192.0.2.1:3"}), "")
      << "the same host";
  EXPECT_THAT(LogOfHandshake("none", {"ipv4:192.0.2.1:4"}), HasSubstr("cause=none"));
  EXPECT_THAT(LogOfHandshake("expired", {"ipv4:192.0.2.2:1"}), HasSubstr("peer=ipv4:192.0.2.2:1"));
  EXPECT_THAT(LogOfHandshake("expired", {}), HasSubstr("peer=unknown"));
  EXPECT_THAT(metrics_.Render(), HasSubstr("epserve_refused_total{reason=\"handshake\"} 5\n"));
}

TEST_F(RefusalsTest, HostsThatMayBeAHandshakesPeerAreToldOfOnce) {
  const std::string log = LogOfHandshake("expired", {"ipv4:192.0.2.1:1", "ipv4:192.0.2.2:1"});
  EXPECT_THAT(log, HasSubstr("peer_one_of=\"ipv4:192.0.2.1:1, ipv4:192.0.2.2:1\""));
  EXPECT_THAT(log, Not(HasSubstr("peer=")));
  EXPECT_EQ(LogOfHandshake("expired", {"ipv4:192.0.2.1:1", "ipv4:192.0.2.3:1"}), "");
  EXPECT_THAT(LogOfHandshake("expired", {"ipv4:192.0.2.1:1"}), HasSubstr("peer=ipv4:192.0.2.1:1"))
      << "that others may have been it takes no line from who it was";
}

TEST_F(RefusalsTest, FailuresInARowAreCountedAndNotAllLookedAt) {
  int looks = 0;
  LogOf([&] {
    for (int i = 0; i < 1500; ++i) {
      now_ += std::chrono::milliseconds(1);
      const auto look = [&looks] {
        ++looks;
        return std::vector<std::string>();
      };
      refusals_.OnHandshake("expired", look, now_);
    }
  });
  EXPECT_EQ(looks, 100) << "50 in each second that began";
  EXPECT_THAT(metrics_.Render(), HasSubstr("epserve_refused_total{reason=\"handshake\"} 1500\n"));
}

}  // namespace
}  // namespace epserve::coordinator
