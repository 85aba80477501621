#include "server/common/peer_host.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace epserve::server {
namespace {

constexpr std::size_t kNetworkBytes = 8;  // of an IPv6 address: what one customer has at least

// The text of the /64 network that holds `address`; of an IPv4 address in IPv6's form, that
// address; empty: it is no IPv6 address.
std::string NetworkOf(std::string_view address) {
  address = address.substr(0, address.find('%'));  // Without the link of a link-local one.
  in6_addr parsed{};
  if (::inet_pton(AF_INET6, std::string(address).c_str(), &parsed) != 1) return "";
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (IN6_IS_ADDR_V4MAPPED(&parsed)) {
    ::inet_ntop(AF_INET, parsed.s6_addr + 12, text.data(), text.size());
    return text.data();
  }
  std::memset(parsed.s6_addr + kNetworkBytes, 0, sizeof(parsed.s6_addr) - kNetworkBytes);
  ::inet_ntop(AF_INET6, &parsed, text.data(), text.size());
  return std::string(text.data()) + "/64";
}

// What stands between the two, or all of `text`.
std::string_view Between(std::string_view text, std::string_view before, std::string_view after) {
  if (!text.starts_with(before)) return text;
  text.remove_prefix(before.size());
  return text.substr(0, text.find(after));
}

}  // namespace

std::string PeerHost(std::string_view peer) {
  if (peer.starts_with("unix:")) return "unix";
  for (const std::string_view scheme : {"ipv4:", "ipv6:"}) {
    if (peer.starts_with(scheme)) peer.remove_prefix(scheme.size());
  }
  const std::string_view address = Between(Between(peer, "%5B", "%5D"), "[", "]");
  if (std::string network = NetworkOf(address); !network.empty()) return network;
  return std::string(peer.substr(0, std::count(peer.begin(), peer.end(), ':') == 1
                                        ? peer.rfind(':')
                                        : std::string_view::npos));
}

}  // namespace epserve::server
