// Passes descriptors to other processes over a Unix socket (SCM_RIGHTS): a rank's heap to its
// peers, clients' shared memory from the coordinator to its workers. Only processes of the same
// user that know the secret get one.
//
// The address is an abstract name, or a path where the ranks share a volume and no network
// namespace: "@epserve-<cluster>-<epoch>-<rank>" or "/dir/epserve-<cluster>-<epoch>-<rank>.sock".
#ifndef EPSERVE_RUNTIME_SYMMETRIC_HANDLE_SOCKET_H_
#define EPSERVE_RUNTIME_SYMMETRIC_HANDLE_SOCKET_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/base/unique_fd.h"

namespace epserve::runtime {

// Address of a rank's socket; `directory` empty: the abstract form.
std::string HandleSocketAddress(const std::string& directory, const std::string& cluster_id,
                                std::uint64_t epoch, int rank);

// Removes the sockets of `cluster_id` in `directory` that nobody serves any more: what workers
// leave that were killed before their peers had opened them. Returns how many. NOT_FOUND: no
// directory.
absl::StatusOr<int> ReclaimStaleSockets(const std::string& directory,
                                        const std::string& cluster_id);

struct OfferedHandle {
  UniqueFd descriptor;
  std::uint64_t bytes = 0;
};

// Serves descriptors from a thread of its own until destroyed.
class HandleServer {
 public:
  // What to give who asks for number `id`; NOT_FOUND: there is none. Called by the server's thread.
  using Offer = std::function<absl::StatusOr<OfferedHandle>(std::uint64_t id)>;

  // `secret` is at most 64 bytes. ALREADY_EXISTS: another process serves that address.
  static absl::StatusOr<std::unique_ptr<HandleServer>> Start(const std::string& address,
                                                             const std::string& secret,
                                                             Offer offer);
  // Of one descriptor, which has no number.
  static absl::StatusOr<std::unique_ptr<HandleServer>> Start(const std::string& address,
                                                             const std::string& secret,
                                                             UniqueFd descriptor,
                                                             std::uint64_t bytes);
  ~HandleServer();

 private:
  HandleServer() = default;
  void Serve();
  void Answer(int connection) const;

  std::string address_;
  std::string secret_;
  Offer offer_;
  UniqueFd listener_;
  UniqueFd stop_;  // eventfd
  std::thread thread_;
};

// The server's one descriptor. UNAVAILABLE: nobody answers there. PERMISSION_DENIED: the server
// refused, or runs as another user.
absl::StatusOr<OfferedHandle> FetchHandle(const std::string& address, const std::string& secret,
                                          absl::Duration timeout);
// The descriptor of number `id`. NOT_FOUND: the server has none of that number; so the secret is
// right.
absl::StatusOr<OfferedHandle> FetchHandle(const std::string& address, const std::string& secret,
                                          std::uint64_t id, absl::Duration timeout);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_HANDLE_SOCKET_H_
