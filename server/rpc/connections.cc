#include "server/rpc/connections.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

namespace epserve::server {
namespace {

constexpr std::string_view kUnixScheme = "unix:";

// Of a handshake: all that the other end sends, with its chain of certificates, in bytes and in
// segments, which tell it from a connection that says little but has long been there; and how long
// ago the last of it may have come, on a machine that is short of cores.
constexpr std::uint64_t kMaxHandshakeBytes = 16 << 10;
constexpr std::uint32_t kMaxHandshakeSegments = 8;
constexpr std::uint32_t kHandshakeRecentMs = 200;

bool IsConnection(int fd) {
  int listens = 0;
  socklen_t size = sizeof(listens);
  return ::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens == 0;
}

// Whether the socket's own end, which an accepted one has from its listener, is that address.
bool IsBoundTo(int fd, std::string_view address, int port) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&storage), &size) != 0) return false;
  if (address.starts_with(kUnixScheme)) {
    if (storage.ss_family != AF_UNIX || size <= sizeof(sa_family_t)) return false;
    std::string_view path = address.substr(kUnixScheme.size());
    if (path.starts_with("//")) path.remove_prefix(2);
    return path == reinterpret_cast<const sockaddr_un*>(&storage)->sun_path;
  }
  if (storage.ss_family == AF_INET) {
    return ntohs(reinterpret_cast<const sockaddr_in*>(&storage)->sin_port) == port;
  }
  return storage.ss_family == AF_INET6 &&
         ntohs(reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port) == port;
}

// Nothing: the system does not tell.
std::optional<tcp_info> InfoOf(int fd) {
  tcp_info info{};
  socklen_t size = sizeof(info);
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return std::nullopt;
  return info;
}

bool MayBeInHandshake(int fd) {
  const std::optional<tcp_info> info = InfoOf(fd);
  return info.has_value() && info->tcpi_last_data_recv <= kHandshakeRecentMs &&
         info->tcpi_bytes_received <= kMaxHandshakeBytes &&
         info->tcpi_data_segs_in <= kMaxHandshakeSegments;
}

// As gRPC names it; empty: it has none any more.
std::string PeerOf(int fd) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&storage), &size) != 0) return "";
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (storage.ss_family == AF_INET) {
    const auto* const peer = reinterpret_cast<const sockaddr_in*>(&storage);
    ::inet_ntop(AF_INET, &peer->sin_addr, text.data(), text.size());
    return "ipv4:" + std::string(text.data()) + ":" + std::to_string(ntohs(peer->sin_port));
  }
  const auto* const peer = reinterpret_cast<const sockaddr_in6*>(&storage);
  const std::string port = std::to_string(ntohs(peer->sin6_port));
  if (IN6_IS_ADDR_V4MAPPED(&peer->sin6_addr)) {  // gRPC's sockets are for both.
    ::inet_ntop(AF_INET, peer->sin6_addr.s6_addr + 12, text.data(), text.size());
    return "ipv4:" + std::string(text.data()) + ":" + port;
  }
  ::inet_ntop(AF_INET6, &peer->sin6_addr, text.data(), text.size());
  return "ipv6:%5B" + std::string(text.data()) + "%5D:" + port;
}

// Calls `use` with each connection that this process accepted there.
template <typename Use>
void ForEachConnection(std::string_view address, int port, Use use) {
  const std::unique_ptr<DIR, int (*)(DIR*)> fds(::opendir("/proc/self/fd"), ::closedir);
  if (fds == nullptr) return;
  while (const dirent* const entry = ::readdir(fds.get())) {
    const int fd = std::atoi(entry->d_name);  // 0 for the folder's own two names
    if (fd > 0 && IsConnection(fd) && IsBoundTo(fd, address, port)) use(fd);
  }
}

}  // namespace

void EndConnections(const std::string& address, int port) {
  // Without /proc they end with the process.
  ForEachConnection(address, port, [](int fd) { ::shutdown(fd, SHUT_RDWR); });
}

std::vector<HalfMessages::Received> ReceivedBytes(int port) {
  std::vector<HalfMessages::Received> connections;
  ForEachConnection("", port, [&connections](int fd) {
    const std::optional<tcp_info> info = InfoOf(fd);
    if (!info.has_value()) return;
    if (std::string peer = PeerOf(fd); !peer.empty()) {
      connections.push_back({std::move(peer), info->tcpi_bytes_received});
    }
  });
  return connections;
}

void EndConnectionOf(const std::string& peer, int port) {
  ForEachConnection("", port, [&peer](int fd) {
    if (PeerOf(fd) == peer) ::shutdown(fd, SHUT_RDWR);
  });
}

std::vector<std::string> PeersInHandshake(int port) {
  std::vector<std::string> peers;
  ForEachConnection("", port, [&peers](int fd) {
    if (!MayBeInHandshake(fd)) return;
    if (std::string peer = PeerOf(fd); !peer.empty()) peers.push_back(std::move(peer));
  });
  return peers;
}

}  // namespace epserve::server
