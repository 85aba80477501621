#include "server/rpc/connections.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

#include "runtime/base/unique_fd.h"

namespace epserve::server {
namespace {

using runtime::UniqueFd;
using testing::ElementsAre;
using testing::IsEmpty;

// A connection over loopback, both ends of which are this process's.
class ConnectionsTest : public testing::Test {
 protected:
  void SetUp() override {
    listener_ = UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    auto* const raw = reinterpret_cast<sockaddr*>(&address);
    socklen_t size = sizeof(address);
    ASSERT_EQ(::bind(listener_.get(), raw, size), 0);
    ASSERT_EQ(::listen(listener_.get(), 1), 0);
    ASSERT_EQ(::getsockname(listener_.get(), raw, &size), 0);
    port_ = ntohs(address.sin_port);
    caller_ = UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::connect(caller_.get(), raw, size), 0);
    accepted_ = UniqueFd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    ASSERT_TRUE(accepted_.valid());
    ASSERT_EQ(::getsockname(caller_.get(), raw, &size), 0);
    peer_ = "ipv4:127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  }

  // Sends that much, and waits until it is there.
  void Send(std::size_t num_bytes) {
    std::string bytes(num_bytes, 'x');
    ASSERT_EQ(::send(caller_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(num_bytes));
    ASSERT_EQ(::recv(accepted_.get(), bytes.data(), bytes.size(), MSG_WAITALL),
              static_cast<ssize_t>(num_bytes));
  }

  UniqueFd listener_;
  UniqueFd caller_;
  UniqueFd accepted_;
  int port_ = 0;
  std::string peer_;
};

TEST_F(ConnectionsTest, PeerThatHasSentLittleAMomentAgoMayBeInItsHandshake) {
  Send(500);
  EXPECT_THAT(PeersInHandshake(port_), ElementsAre(peer_));
  EXPECT_THAT(PeersInHandshake(port_ == 1 ? 2 : 1), IsEmpty()) << "another port's";
}

TEST_F(ConnectionsTest, PeerThatHasSentMuchIsNotInItsHandshake) {
  Send(100'000);
  EXPECT_THAT(PeersInHandshake(port_), IsEmpty());
}

TEST_F(ConnectionsTest, PeerThatHasSentLittleAgainAndAgainIsNotInItsHandshake) {
  for (int i = 0; i < 20; ++i) Send(10);
  EXPECT_THAT(PeersInHandshake(port_), IsEmpty());
}

TEST_F(ConnectionsTest, PeerThatHasBeenSilentIsNotInItsHandshake) {
  Send(500);
  // Until the kernel finds it so: what ended a moment ago is told of for a while.
  while (!PeersInHandshake(port_).empty()) ::usleep(10'000);
}

TEST_F(ConnectionsTest, EndedConnectionIsToldToBothSidesAndTheListenerStays) {
  EndConnections("127.0.0.1:0", port_);
  char byte = 0;
  EXPECT_EQ(::recv(caller_.get(), &byte, 1, 0), 0);
  EXPECT_EQ(::recv(accepted_.get(), &byte, 1, 0), 0);
  int listens = 0;
  socklen_t size = sizeof(listens);
  ASSERT_EQ(::getsockopt(listener_.get(), SOL_SOCKET, SO_ACCEPTCONN, &listens, &size), 0);
  EXPECT_EQ(listens, 1);
}

}  // namespace
}  // namespace epserve::server
