#include "server/rpc/connections.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "tests/support/loopback.h"

namespace epserve::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class ConnectionsTest : public testing::Test {
 protected:
  LoopbackListener listener_;
  LoopbackConnection connection_ = listener_.Connect();
};

TEST_F(ConnectionsTest, PeerThatHasSentLittleAMomentAgoMayBeInItsHandshake) {
  std::vector<std::string> found;
  // On a busy machine the moment may have passed before this asks: then another peer.
  for (int attempt = 0; found.empty() && attempt < 20; ++attempt) {
    connection_ = listener_.Connect();
    connection_.Send(500);
    found = PeersInHandshake(listener_.port());
    EXPECT_THAT(PeersInHandshake(1), IsEmpty()) << "another port's";
  }
  EXPECT_THAT(found, ElementsAre(connection_.peer));
}

TEST_F(ConnectionsTest, PeerThatHasSentMuchIsNotInItsHandshake) {
  connection_.Send(100'000);
  EXPECT_THAT(PeersInHandshake(listener_.port()), IsEmpty());
}

TEST_F(ConnectionsTest, PeerThatHasSentLittleAgainAndAgainIsNotInItsHandshake) {
  for (int i = 0; i < 20; ++i) connection_.Send(10);
  EXPECT_THAT(PeersInHandshake(listener_.port()), IsEmpty());
}

TEST_F(ConnectionsTest, PeerThatHasBeenSilentIsNotInItsHandshake) {
  connection_.Send(500);
  // Until the kernel finds it so: what ended a moment ago is told of for a while.
  while (!PeersInHandshake(listener_.port()).empty()) ::usleep(10'000);
}

TEST_F(ConnectionsTest, WhatHasComeOverEachConnectionIsCounted) {
  const LoopbackConnection other = listener_.Connect();
  connection_.Send(500);
  connection_.Send(40'000);
  for (const HalfMessages::Received& found : ReceivedBytes(listener_.port())) {
    EXPECT_EQ(found.num_bytes, found.peer == connection_.peer ? 40'500 : 0) << found.peer;
  }
  EXPECT_EQ(ReceivedBytes(listener_.port()).size(), 2);
  EXPECT_THAT(ReceivedBytes(1), IsEmpty());
}

TEST_F(ConnectionsTest, ConnectionOfOnePeerIsEndedAndNoOther) {
  const LoopbackConnection other = listener_.Connect();
  EndConnectionOf(connection_.peer, listener_.port());
  char byte = 0;
  EXPECT_EQ(::recv(connection_.caller.get(), &byte, 1, 0), 0);
  other.Send(5);
}

TEST_F(ConnectionsTest, EndedConnectionsAreToldToBothSidesAndTheListenerStays) {
  EndConnections("127.0.0.1:0", listener_.port());
  char byte = 0;
  EXPECT_EQ(::recv(connection_.caller.get(), &byte, 1, 0), 0);
  EXPECT_EQ(::recv(connection_.accepted.get(), &byte, 1, 0), 0);
  listener_.Connect().Send(5);
}

}  // namespace
}  // namespace epserve::server
