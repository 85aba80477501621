#include "server/rpc/connections.h"

#include <dirent.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstdlib>
#include <memory>
#include <string_view>

namespace epserve::server {
namespace {

constexpr std::string_view kUnixScheme = "unix:";

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

}  // namespace

void EndConnections(const std::string& address, int port) {
  const std::unique_ptr<DIR, int (*)(DIR*)> fds(::opendir("/proc/self/fd"), ::closedir);
  if (fds == nullptr) return;  // Without /proc they end with the process.
  while (const dirent* const entry = ::readdir(fds.get())) {
    const int fd = std::atoi(entry->d_name);  // 0 for the folder's own two names
    if (fd > 0 && IsConnection(fd) && IsBoundTo(fd, address, port)) ::shutdown(fd, SHUT_RDWR);
  }
}

}  // namespace epserve::server
