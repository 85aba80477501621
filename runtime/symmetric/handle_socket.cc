#include "runtime/symmetric/handle_socket.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

constexpr std::size_t kSecretBytes = 64;
constexpr std::uint64_t kMagic = 0x6570736876310001;  // "epshv1", version 1
// Opens a request that a descriptor's number follows, and a reply that has none of that number.
constexpr std::uint64_t kNumberedMagic = kMagic + 1;
constexpr std::uint64_t kNothingMagic = kMagic + 2;
constexpr std::uint64_t kRefusedMagic = kMagic + 3;  // a reply to another secret
// A peer that connects and says nothing must not hold the server for longer than this.
constexpr absl::Duration kAnswerTimeout = absl::Seconds(1);
// How long a socket may be bound before it is listened to.
constexpr absl::Duration kLongestStart = absl::Minutes(1);
constexpr int kBacklog = 64;  // callers that wait; there are no more ranks
// Before the next try where a caller cannot be taken in, for want of file descriptors: it still
// waits, so that poll() would not.
constexpr int kRetryMs = 100;

struct Request {
  std::uint64_t magic = kMagic;
  char secret[kSecretBytes] = {};
};

struct Reply {
  std::uint64_t magic = kMagic;
  std::uint64_t bytes = 0;
};

absl::Status SocketError(const char* call, const std::string& address) {
  const int error = errno;
  const std::string message =
      absl::StrCat("handle socket: ", call, " on ", address, " failed: ", std::strerror(error));
  if (error == EADDRINUSE || error == EEXIST) return absl::AlreadyExistsError(message);
  if (error == ECONNREFUSED || error == ENOENT || error == EAGAIN || error == ECONNRESET ||
      error == EPIPE) {
    return absl::UnavailableError(message);
  }
  return absl::InternalError(message);
}

// The result of `call`, made again while signals interrupt it. A socket with a timeout is
// interrupted whatever the handler says, and by SIGCONT too: a container that was paused goes on.
template <typename Call>
ssize_t Uninterrupted(Call call) {
  ssize_t result;
  do {
    result = call();
  } while (result < 0 && errno == EINTR);
  return result;
}

bool ReadWhole(int connection, void* data, std::size_t bytes) {
  return Uninterrupted([&] { return recv(connection, data, bytes, MSG_WAITALL); }) ==
         static_cast<ssize_t>(bytes);
}

absl::StatusOr<socklen_t> FillAddress(const std::string& address, sockaddr_un* out) {
  *out = sockaddr_un{};
  out->sun_family = AF_UNIX;
  if (address.size() < 2 || address.size() >= sizeof(out->sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "handle socket: address ", address, " has ", address.size(), " bytes, allowed are 2 to ",
        sizeof(out->sun_path) - 1, "; shorten the cluster id or the directory"));
  }
  std::memcpy(out->sun_path, address.data(), address.size());
  if (address[0] == '@') {
    out->sun_path[0] = '\0';
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
  }
  return static_cast<socklen_t>(sizeof(sockaddr_un));
}

absl::Status SetTimeouts(int fd, absl::Duration timeout, const std::string& address) {
  const timeval value = absl::ToTimeval(timeout);
  if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &value, sizeof(value)) != 0 ||
      setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &value, sizeof(value)) != 0) {
    return SocketError("setsockopt", address);
  }
  return absl::OkStatus();
}

// epserve-<cluster_id>-<epoch>-<rank>.sock, exactly: a cluster's id may hold dashes too.
// `finished`: without the end that it has while ListenAtPath() is at work.
bool IsSocketOf(std::string_view file, const std::string& prefix, bool* finished) {
  constexpr std::string_view kSuffix = ".sock";
  const auto is_number = [](std::string_view text) {
    return !text.empty() && text.find_first_not_of("0123456789") == text.npos;
  };
  const std::size_t tilde = file.rfind('~');
  *finished = tilde == file.npos;
  if (!*finished) {
    if (!is_number(file.substr(tilde + 1))) return false;
    file = file.substr(0, tilde);
  }
  if (!file.starts_with(prefix) || !file.ends_with(kSuffix)) return false;
  file.remove_prefix(prefix.size());
  file.remove_suffix(kSuffix.size());
  const std::size_t dash = file.find('-');
  return dash != file.npos && is_number(file.substr(0, dash)) && is_number(file.substr(dash + 1));
}

// The path appears with a listener behind it: to ReclaimStaleSockets one that is bound and not yet
// listened to would be a dead one's. Until then it has a name that nobody else takes.
absl::Status ListenAtPath(int listener, const std::string& path) {
  std::uint16_t unique = 0;
  if (::getrandom(&unique, sizeof(unique), 0) != static_cast<ssize_t>(sizeof(unique))) {
    return SocketError("getrandom", path);
  }
  const std::string unfinished = absl::StrCat(path, "~", unique);
  sockaddr_un name;
  EPS_ASSIGN_OR_RETURN(const socklen_t length, FillAddress(unfinished, &name));
  if (bind(listener, reinterpret_cast<sockaddr*>(&name), length) != 0) {
    return SocketError("bind", unfinished);
  }
  absl::Status status;
  if (listen(listener, kBacklog) != 0) status = SocketError("listen", unfinished);
  if (status.ok() && link(unfinished.c_str(), path.c_str()) != 0) {
    status = SocketError("link", path);
  }
  unlink(unfinished.c_str());
  return status;
}

bool IsOlderThan(const std::string& path, absl::Duration age) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 &&
         absl::Now() - absl::TimeFromTimespec(found.st_mtim) > age;
}

bool SameUser(int fd) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

bool SecretsMatch(const char* given, const std::string& secret) {
  char expected[kSecretBytes] = {};
  std::memcpy(expected, secret.data(), secret.size());
  unsigned difference = 0;  // Every byte is looked at, so that timing tells nothing.
  for (std::size_t i = 0; i < kSecretBytes; ++i) {
    difference |= static_cast<unsigned char>(given[i] ^ expected[i]);
  }
  return difference == 0;
}

}  // namespace

std::string HandleSocketAddress(const std::string& directory, const std::string& cluster_id,
                                std::uint64_t epoch, int rank) {
  const std::string name = absl::StrCat("epserve-", cluster_id, "-", epoch, "-", rank);
  return directory.empty() ? absl::StrCat("@", name) : absl::StrCat(directory, "/", name, ".sock");
}

absl::StatusOr<int> ReclaimStaleSockets(const std::string& directory,
                                        const std::string& cluster_id) {
  const std::unique_ptr<DIR, int (*)(DIR*)> opened(::opendir(directory.c_str()), &::closedir);
  if (opened == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("handle socket: opendir of ", directory, " failed: ", std::strerror(errno)));
  }
  const std::string prefix = absl::StrCat("epserve-", cluster_id, "-");
  int reclaimed = 0;
  while (const dirent* entry = ::readdir(opened.get())) {
    bool finished = false;
    if (!IsSocketOf(entry->d_name, prefix, &finished)) continue;
    const std::string path = absl::StrCat(directory, "/", entry->d_name);
    if (!finished && !IsOlderThan(path, kLongestStart)) continue;
    sockaddr_un name;
    EPS_ASSIGN_OR_RETURN(const socklen_t length, FillAddress(path, &name));
    const UniqueFd probe(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!probe.valid()) return SocketError("socket", path);
    if (connect(probe.get(), reinterpret_cast<sockaddr*>(&name), length) == 0) continue;
    if (errno == ECONNREFUSED && unlink(path.c_str()) == 0) ++reclaimed;
  }
  return reclaimed;
}

absl::StatusOr<std::unique_ptr<HandleServer>> HandleServer::Start(const std::string& address,
                                                                  const std::string& secret,
                                                                  UniqueFd descriptor,
                                                                  std::uint64_t bytes) {
  const auto one = std::make_shared<const UniqueFd>(std::move(descriptor));
  return Start(address, secret, [one, bytes](std::uint64_t) -> absl::StatusOr<OfferedHandle> {
    UniqueFd copy(fcntl(one->get(), F_DUPFD_CLOEXEC, 0));
    if (!copy.valid()) return absl::InternalError("handle socket: fcntl failed");
    return OfferedHandle{std::move(copy), bytes};
  });
}

absl::StatusOr<std::unique_ptr<HandleServer>> HandleServer::Start(const std::string& address,
                                                                  const std::string& secret,
                                                                  Offer offer) {
  if (secret.size() > kSecretBytes) {
    return absl::InvalidArgumentError(absl::StrCat("handle socket: secret has ", secret.size(),
                                                   " bytes, at most ", kSecretBytes,
                                                   " are allowed"));
  }
  std::unique_ptr<HandleServer> server(new HandleServer);
  sockaddr_un name;
  EPS_ASSIGN_OR_RETURN(const socklen_t length, FillAddress(address, &name));
  UniqueFd listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!listener.valid()) return SocketError("socket", address);
  if (address[0] == '@') {
    if (bind(listener.get(), reinterpret_cast<sockaddr*>(&name), length) != 0) {
      return SocketError("bind", address);
    }
    if (listen(listener.get(), kBacklog) != 0) return SocketError("listen", address);
  } else {
    EPS_RETURN_IF_ERROR(ListenAtPath(listener.get(), address));
  }
  server->address_ = address;  // From here on the destructor removes the path.
  server->stop_ = UniqueFd(eventfd(0, EFD_CLOEXEC));
  if (!server->stop_.valid()) return SocketError("eventfd", address);
  server->listener_ = std::move(listener);
  server->secret_ = secret;
  server->offer_ = std::move(offer);
  server->thread_ = std::thread([raw = server.get()] { raw->Serve(); });
  return server;
}

HandleServer::~HandleServer() {
  if (thread_.joinable()) {
    const std::uint64_t one = 1;
    // An eventfd takes a write of 1 unless its counter is about to overflow.
    if (write(stop_.get(), &one, sizeof(one)) != sizeof(one)) std::abort();
    thread_.join();
  }
  if (!address_.empty() && address_[0] != '@') unlink(address_.c_str());
}

void HandleServer::Serve() {
  for (;;) {
    pollfd fds[2] = {{listener_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) return;
    if ((fds[1].revents & POLLIN) != 0) return;
    if ((fds[0].revents & POLLIN) == 0) continue;
    const UniqueFd connection(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (connection.valid()) {
      Answer(connection.get());
    } else {
      poll(&fds[1], 1, kRetryMs);
    }
  }
}

void HandleServer::Answer(int connection) const {
  // A stranger is told nothing.
  if (!SameUser(connection) || !SetTimeouts(connection, kAnswerTimeout, address_).ok()) return;
  Request request;
  if (!ReadWhole(connection, &request, sizeof(request))) return;
  if (request.magic != kMagic && request.magic != kNumberedMagic) return;
  // Read to its end before it is refused, or closing would reset the connection.
  std::uint64_t id = 0;
  if (request.magic == kNumberedMagic && !ReadWhole(connection, &id, sizeof(id))) return;
  if (!SecretsMatch(request.secret, secret_)) {
    const Reply refusal{.magic = kRefusedMagic};
    Uninterrupted([&] { return send(connection, &refusal, sizeof(refusal), MSG_NOSIGNAL); });
    return;
  }
  const absl::StatusOr<OfferedHandle> offered = offer_(id);
  if (!offered.ok() && !absl::IsNotFound(offered.status())) return;
  Reply reply;
  reply.magic = offered.ok() ? kMagic : kNothingMagic;
  reply.bytes = offered.ok() ? offered->bytes : 0;
  iovec data{&reply, sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (offered.ok()) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int fd = offered->descriptor.get();
    std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
  }
  // A peer that went away gets nothing, and asks again if it still lives.
  Uninterrupted([&] { return sendmsg(connection, &message, MSG_NOSIGNAL); });
}

namespace {

absl::StatusOr<OfferedHandle> TakeReply(int connection, const std::string& address) {
  Reply reply;
  iovec data{&reply, sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t received =
      Uninterrupted([&] { return recvmsg(connection, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL); });
  if (received < 0) return SocketError("recvmsg", address);
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  OfferedHandle result;
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
    result.descriptor = UniqueFd(fd);
  }
  if (received == sizeof(reply) && reply.magic == kNothingMagic) {
    return absl::NotFoundError(
        absl::StrCat("handle socket: ", address, " has no descriptor of that number"));
  }
  if (received == sizeof(reply) && reply.magic == kRefusedMagic) {
    return absl::PermissionDeniedError(
        absl::StrCat("handle socket: ", address,
                     " refused; the cluster's secret must be the same on every worker"));
  }
  // Its process ended meanwhile, or had to wait for others for too long.
  if (received != sizeof(reply)) {
    return absl::UnavailableError(
        absl::StrCat("handle socket: ", address, " ended without an answer; ask again"));
  }
  if (reply.magic != kMagic || !result.descriptor.valid()) {
    return absl::InternalError(absl::StrCat("handle socket: ", address,
                                            " gave an answer that is none; all workers must "
                                            "be of one version"));
  }
  result.bytes = reply.bytes;
  return result;
}

absl::StatusOr<OfferedHandle> Fetch(const std::string& address, const std::string& secret,
                                    std::optional<std::uint64_t> id, absl::Duration timeout) {
  if (secret.size() > kSecretBytes) {
    return absl::InvalidArgumentError(absl::StrCat("handle socket: secret has ", secret.size(),
                                                   " bytes, at most ", kSecretBytes,
                                                   " are allowed"));
  }
  sockaddr_un name;
  EPS_ASSIGN_OR_RETURN(const socklen_t length, FillAddress(address, &name));
  const UniqueFd connection(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!connection.valid()) return SocketError("socket", address);
  EPS_RETURN_IF_ERROR(SetTimeouts(connection.get(), timeout, address));
  if (Uninterrupted([&] {
        return connect(connection.get(), reinterpret_cast<sockaddr*>(&name), length);
      }) != 0) {
    return SocketError("connect", address);
  }
  if (!SameUser(connection.get())) {
    return absl::PermissionDeniedError(absl::StrCat(
        "handle socket: ", address, " is served by another user; run all workers as one"));
  }
  Request request;
  request.magic = id ? kNumberedMagic : kMagic;
  std::memcpy(request.secret, secret.data(), secret.size());
  std::string bytes(reinterpret_cast<const char*>(&request), sizeof(request));
  if (id) bytes.append(reinterpret_cast<const char*>(&*id), sizeof(*id));
  if (Uninterrupted([&] {
        return send(connection.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      }) != static_cast<ssize_t>(bytes.size())) {
    return SocketError("send", address);
  }
  return TakeReply(connection.get(), address);
}

}  // namespace

absl::StatusOr<OfferedHandle> FetchHandle(const std::string& address, const std::string& secret,
                                          absl::Duration timeout) {
  return Fetch(address, secret, std::nullopt, timeout);
}

absl::StatusOr<OfferedHandle> FetchHandle(const std::string& address, const std::string& secret,
                                          std::uint64_t id, absl::Duration timeout) {
  return Fetch(address, secret, id, timeout);
}

}  // namespace epserve::runtime
