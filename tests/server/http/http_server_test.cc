#include "server/http/http_server.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/unique_fd.h"

namespace epserve::server {
namespace {

using runtime::UniqueFd;
using testing::HasSubstr;
using testing::Not;
using Clock = std::chrono::steady_clock;

// Not valid on failure. Reading waits twenty seconds at most.
UniqueFd Connect(int port) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval patience{20, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return {};
  return fd;
}

bool Send(const UniqueFd& fd, const std::string& bytes) {
  return ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
         static_cast<ssize_t>(bytes.size());
}

// All that comes until the other side ends the connection.
std::string ReadToEnd(const UniqueFd& fd) {
  std::string answer;
  char buffer[4096];
  for (ssize_t got; (got = ::recv(fd.get(), buffer, sizeof(buffer), 0)) > 0;) {
    answer.append(buffer, static_cast<std::size_t>(got));
  }
  return answer;
}

std::string Ask(int port, const std::string& request) {
  const UniqueFd fd = Connect(port);
  return Send(fd, request) ? ReadToEnd(fd) : "";
}

std::string Get(int port) { return Ask(port, "GET /a?b HTTP/1.1\r\nHost: x\r\n\r\n"); }

HttpReply Echo(const HttpRequest& request) {
  return {200, "text/plain",
          absl::StrCat(request.target, "|", request.authorization, "|", request.encrypted)};
}

std::unique_ptr<HttpServer> Serve(HttpServerOptions options = {}) {
  options.listen = "127.0.0.1:0";
  auto server = HttpServer::Create(options, Echo);
  EXPECT_TRUE(server.ok()) << server.status();
  return *std::move(server);
}

TEST(HttpServerTest, GetIsAnsweredByTheHandlerAndTheConnectionEnds) {
  const auto server = Serve();
  ASSERT_GT(server->port(), 0);
  const std::string answer =
      Ask(server->port(), "GET /a?b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer y\r\n\r\n");
  EXPECT_THAT(answer, HasSubstr("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(answer, HasSubstr("Connection: close\r\n"));
  EXPECT_THAT(answer, HasSubstr("\r\n\r\n/a?b|Bearer y|0"));
}

TEST(HttpServerTest, HeadGetsTheHeaderAlone) {
  const auto server = Serve();
  const std::string answer = Ask(server->port(), "HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_THAT(answer, HasSubstr("Content-Length: 5\r\n"));
  EXPECT_TRUE(answer.ends_with("\r\n\r\n")) << answer;
}

TEST(HttpServerTest, WhatIsNoGetIsRefusedWithTheStatusThatSaysWhy) {
  const auto server = Serve();
  const int port = server->port();
  EXPECT_THAT(Ask(port, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
              HasSubstr("HTTP/1.1 405 "));
  EXPECT_THAT(Ask(port, "nonsense\r\n\r\n"), HasSubstr("HTTP/1.1 400 "));
  EXPECT_THAT(Ask(port, absl::StrCat("GET / HTTP/1.1\r\nX: ", std::string(32 << 10, 'a'))),
              HasSubstr("HTTP/1.1 431 "));
  EXPECT_THAT(Get(port), HasSubstr("200 OK"));
}

TEST(HttpServerTest, SilentConnectionsDelayNobodyAndOneTooManyEndsTheOldest) {
  HttpServerOptions options;
  options.max_connections = 4;
  const auto server = Serve(options);
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 4; ++i) silent.push_back(Connect(server->port()));
  const auto start = Clock::now();
  EXPECT_THAT(Get(server->port()), HasSubstr("200 OK"));
  EXPECT_LT(Clock::now() - start, options.max_time / 2);
  // Its place is what the one that was answered took.
  EXPECT_EQ(ReadToEnd(silent[0]), "");
  EXPECT_LT(Clock::now() - start, options.max_time / 2);
  Send(silent[3], "GET /late HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_THAT(ReadToEnd(silent[3]), HasSubstr("/late"));
}

TEST(HttpServerTest, CallerWhoSendsAByteNowAndThenIsCutOffAfterItsTime) {
  HttpServerOptions options;
  options.max_time = std::chrono::milliseconds(300);
  const auto server = Serve(options);
  const UniqueFd slow = Connect(server->port());
  const auto start = Clock::now();
  std::atomic<bool> ended{false};
  std::thread sender([&] {
    Send(slow, "GET / HTTP/1.1\r\nX: ");
    // Far more often than the server would ask for if it counted silence alone.
    while (!ended && Send(slow, "a")) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  });
  EXPECT_EQ(ReadToEnd(slow), "");
  ended = true;
  sender.join();
  EXPECT_GE(Clock::now() - start, options.max_time);
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(10));
}

TEST(HttpServerTest, StopsAtOnceWhileCallersAreConnected) {
  const HttpServerOptions options;
  auto server = Serve(options);
  const UniqueFd silent = Connect(server->port());
  EXPECT_THAT(Get(server->port()), HasSubstr("200 OK"));
  const auto start = Clock::now();
  server.reset();
  EXPECT_LT(Clock::now() - start, options.max_time / 2);
  EXPECT_EQ(ReadToEnd(silent), "");
}

TEST(HttpServerTest, AddressThatCannotBeBoundIsUnavailableAndNamed) {
  const auto first = Serve();
  HttpServerOptions options;
  options.listen = absl::StrCat("127.0.0.1:", first->port());
  const absl::Status status = HttpServer::Create(options, Echo).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr(options.listen));
  EXPECT_THAT(std::string(status.message()), HasSubstr("in use"));
}

TEST(HttpServerTest, FilesThatAreNoCertificatesAreRefusedByFlag) {
  const std::string path = absl::StrCat(testing::TempDir(), "/no-pem");
  std::ofstream(path) << "this is no PEM file\n";
  HttpServerOptions options;
  options.listen = "127.0.0.1:0";
  options.tls = {path, path, path};
  const absl::Status status = HttpServer::Create(options, Echo).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("--tls-cert ", path)));
}

}  // namespace
}  // namespace epserve::server
