#include "server/coordinator/metrics.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/unique_fd.h"

namespace epserve::coordinator {
namespace {

using ::testing::HasSubstr;

// Not valid on failure. Reading waits ten seconds at most.
runtime::UniqueFd Connect(int port) {
  runtime::UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval patience{10, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return {};
  return fd;
}

// GET /metrics over a plain socket; empty on any failure.
std::string Scrape(int port) {
  const runtime::UniqueFd fd = Connect(port);
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  if (::send(fd.get(), request.data(), request.size(), 0) < 0) return "";
  std::string answer;
  char buffer[4096];
  for (ssize_t got; (got = ::recv(fd.get(), buffer, sizeof(buffer), 0)) > 0;) {
    answer.append(buffer, static_cast<std::size_t>(got));
  }
  return answer;
}

TEST(MetricsTest, EndpointOffersEveryName) {
  auto metrics = Metrics::Create("127.0.0.1:0", 4);
  ASSERT_TRUE(metrics.ok()) << metrics.status();
  ASSERT_GT((*metrics)->port(), 0);
  const std::string text = Scrape((*metrics)->port());
  EXPECT_THAT(text, HasSubstr("200 OK"));
  for (const char* line :
       {"epserve_requests_total{outcome=\"ok\"} 0",
        "epserve_requests_total{outcome=\"resource_exhausted\"} 0", "epserve_queue_depth 0",
        "epserve_tokens_total 0", "epserve_batches_total{count_exchange=\"coordinator\"} 0",
        "epserve_batches_total{count_exchange=\"streams\"} 0",
        "epserve_batches_total{count_exchange=\"device\"} 0",
        "epserve_phase_seconds_count{phase=\"queue\"} 0",
        "epserve_phase_seconds_count{phase=\"assign\"} 0",
        "epserve_phase_seconds_count{phase=\"counts\"} 0",
        "epserve_phase_seconds_count{phase=\"dispatch\"} 0",
        "epserve_phase_seconds_count{phase=\"ffn\"} 0",
        "epserve_phase_seconds_count{phase=\"combine\"} 0",
        "epserve_phase_seconds_count{phase=\"reply\"} 0",
        "epserve_expert_rows_total{expert=\"3\"} 0", "epserve_epoch 0",
        "epserve_workers{state=\"serving\"} 0", "epserve_batches_in_flight 0",
        "epserve_request_seconds_count 0"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(MetricsTest, SilentConnectionsDoNotHoldAScrapeUp) {
  auto metrics = Metrics::Create("127.0.0.1:0", 1);
  ASSERT_TRUE(metrics.ok()) << metrics.status();
  const int port = (*metrics)->port();
  std::vector<runtime::UniqueFd> silent;
  for (int i = 0; i < 2; ++i) silent.push_back(Connect(port));
  EXPECT_THAT(Scrape(port), HasSubstr("200 OK"));
  // More of them than threads: the first are sent away.
  for (int i = 0; i < 6; ++i) silent.push_back(Connect(port));
  EXPECT_THAT(Scrape(port), HasSubstr("200 OK"));
}

TEST(MetricsTest, NumbersFollowWhatIsCounted) {
  auto created = Metrics::Create("off", 4);
  ASSERT_TRUE(created.ok());
  Metrics& metrics = **created;
  EXPECT_EQ(metrics.port(), 0);
  metrics.AddRequest(absl::StatusCode::kOk, 0.003);
  metrics.AddRequest(absl::StatusCode::kResourceExhausted, 0.001);
  metrics.AddTokens(64);
  metrics.AddBatch(CountExchange::kDevice);
  metrics.AddBatch(CountExchange::kDevice);
  metrics.AddBatch(CountExchange::kStreams);
  metrics.AddExpertRows(2, 5);
  metrics.AddExpertRows(4, 5);   // Beyond the experts: counts nowhere.
  metrics.AddExpertRows(-1, 5);  // The same.
  metrics.SetEpoch(1760000001);
  metrics.SetWorkers({{"serving", 1}, {"serving", 1}, {"loading", 1}});
  metrics.ObservePhase(PhaseMetric::kFfn, 0.002);
  std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("epserve_requests_total{outcome=\"ok\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_requests_total{outcome=\"resource_exhausted\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_request_seconds_count 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_tokens_total 64\n"));
  EXPECT_THAT(text, HasSubstr("epserve_batches_total{count_exchange=\"coordinator\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("epserve_batches_total{count_exchange=\"streams\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_batches_total{count_exchange=\"device\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_expert_rows_total{expert=\"2\"} 5\n"));
  EXPECT_THAT(text, HasSubstr("epserve_epoch 1760000001\n"));
  EXPECT_THAT(text, HasSubstr("epserve_workers{state=\"serving\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("epserve_workers{state=\"loading\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("epserve_phase_seconds_count{phase=\"ffn\"} 1\n"));
  metrics.SetWorkers({});
  EXPECT_THAT(metrics.Render(), HasSubstr("epserve_workers{state=\"serving\"} 0\n"));
}

TEST(MetricsTest, AddressThatCannotBeBoundIsUnavailable) {
  auto first = Metrics::Create("127.0.0.1:0", 1);
  ASSERT_TRUE(first.ok());
  const std::string taken = absl::StrCat("127.0.0.1:", (*first)->port());
  auto second = Metrics::Create(taken, 1);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(taken));
}

}  // namespace
}  // namespace epserve::coordinator
