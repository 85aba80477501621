#include "server/coordinator/region_server.h"

#include <cstdint>
#include <random>

#include "absl/strings/str_cat.h"
#include "runtime/base/limits.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace epserve::coordinator {
namespace {

constexpr char kSharedMemoryDir[] = "/dev/shm";

// From the operating system, so that nobody guesses it. 64 bytes.
std::string MakeSecret() {
  std::random_device random;
  std::string secret;
  for (int i = 0; i < 8; ++i) absl::StrAppend(&secret, absl::Hex(random(), absl::kZeroPad8));
  return secret;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RegionServer>> RegionServer::Start(const std::string& cluster_id,
                                                                  const ShmRegistry* registry) {
  EPS_ASSIGN_OR_RETURN(const int reclaimed,
                       runtime::ReclaimStaleSockets(kSharedMemoryDir, cluster_id));
  if (reclaimed > 0) {
    runtime::LogInfo("stale_sockets_reclaimed", {{"cluster_id", cluster_id}, {"count", reclaimed}});
  }
  // A number of its own: in containers every coordinator has the same process id.
  RegionAccess access = {
      runtime::HandleSocketAddress(kSharedMemoryDir, cluster_id, std::random_device()(),
                                   runtime::kCoordinatorRank),
      MakeSecret()};
  const auto offer = [registry](std::uint64_t id) -> absl::StatusOr<runtime::OfferedHandle> {
    EPS_ASSIGN_OR_RETURN(runtime::UniqueFd descriptor, registry->DuplicateDescriptor(id));
    return runtime::OfferedHandle{std::move(descriptor), 0};
  };
  EPS_ASSIGN_OR_RETURN(auto socket,
                       runtime::HandleServer::Start(access.socket, access.secret, offer));
  return std::unique_ptr<RegionServer>(new RegionServer(std::move(access), std::move(socket)));
}

}  // namespace epserve::coordinator
