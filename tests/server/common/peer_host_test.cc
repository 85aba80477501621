#include "server/common/peer_host.h"

#include <gtest/gtest.h>

namespace epserve::server {
namespace {

TEST(PeerHostTest, ConnectionsOfOneAddressAreOneHost) {
  EXPECT_EQ(PeerHost("ipv4:192.0.2.1:40000"), "192.0.2.1");
  EXPECT_EQ(PeerHost("ipv4:192.0.2.1:40001"), "192.0.2.1");
  EXPECT_EQ(PeerHost("192.0.2.1:40001"), "192.0.2.1");
  EXPECT_EQ(PeerHost("192.0.2.1"), "192.0.2.1");
  EXPECT_EQ(PeerHost("ipv4:192.0.2.2:40000"), "192.0.2.2");
}

TEST(PeerHostTest, AddressesOfOneNetworkOfIpv6AreOneHost) {
  for (const char* peer :
       {"ipv6:%5B2001:db8:1:2::1%5D:40000", "ipv6:[2001:db8:1:2:ffff:ffff:ffff:ffff]:40000",
        "[2001:db8:1:2:3::]:1", "2001:db8:1:2::5"}) {
    EXPECT_EQ(PeerHost(peer), "2001:db8:1:2::/64") << peer;
  }
  EXPECT_EQ(PeerHost("ipv6:%5B2001:db8:1:3::1%5D:40000"), "2001:db8:1:3::/64");
  EXPECT_EQ(PeerHost("ipv6:%5B::1%5D:40000"), "::/64");
}

TEST(PeerHostTest, Ipv4AddressOfASocketForBothIsTheSameHost) {
  EXPECT_EQ(PeerHost("ipv6:%5B::ffff:192.0.2.1%5D:40000"), "192.0.2.1");
}

TEST(PeerHostTest, CallersOverUnixSocketsAreOneAndWhatIsUnknownStays) {
  EXPECT_EQ(PeerHost("unix:"), "unix");
  EXPECT_EQ(PeerHost("unix:/run/epserve.sock"), "unix");
  EXPECT_EQ(PeerHost("unknown"), "unknown");
  EXPECT_EQ(PeerHost(""), "");
}

}  // namespace
}  // namespace epserve::server
