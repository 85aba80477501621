// Asks the access policy about every call and every scrape, with what gRPC or HTTP know of the
// caller. Secrets are read again when their file changes. Thread-safe.
#ifndef EPSERVE_SERVER_COORDINATOR_ACCESS_H_
#define EPSERVE_SERVER_COORDINATOR_ACCESS_H_

#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/common/file_watcher.h"
#include "server/common/tls.h"
#include "server/coordinator/access_policy.h"
#include "server/coordinator/refusals.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

class Access {
 public:
  // See AccessPolicy::Create(). `refusals` outlives it.
  static absl::StatusOr<std::shared_ptr<Access>> Create(const server::TlsFiles& tls,
                                                        const std::string& secrets_file,
                                                        Refusals* refusals);

  // As AccessPolicy::Check(); a refusal is told to `refusals`.
  absl::Status Check(std::string_view method, const Caller& caller, const std::string& peer);

 private:
  explicit Access(Refusals* refusals) : refusals_(refusals) {}

  Refusals* const refusals_;
  std::mutex mutex_;
  std::shared_ptr<const AccessPolicy> policy_;    // Guarded by mutex_.
  std::unique_ptr<server::FileWatcher> watcher_;  // Last: it ends before what it sets goes.
};

// Has `access` asked before each call's handler.
void SetAccess(std::shared_ptr<Access> access, server::RpcServer* server);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ACCESS_H_
