// Notices the end of the workers' processes on the coordinator's own machine, so that the lease of
// one that was killed need not be waited for. Of workers elsewhere, and in containers with process
// ids of their own, it learns nothing; for them the lease decides.
//
// Thread-safe. One thread of its own, which calls `on_ended`.
#ifndef EPSERVE_SERVER_COORDINATOR_PROCESS_WATCH_H_
#define EPSERVE_SERVER_COORDINATOR_PROCESS_WATCH_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/unique_fd.h"
#include "server/common/process_identity.h"
#include "server/coordinator/state_machine/events.h"

namespace epserve::coordinator {

class ProcessWatch {
 public:
  // `on_ended` is called once for each watched process that ends, and not after Stop().
  static absl::StatusOr<std::unique_ptr<ProcessWatch>> Start(
      std::function<void(ProcessEnded)> on_ended);
  ~ProcessWatch();  // Stops.
  ProcessWatch(const ProcessWatch&) = delete;
  ProcessWatch& operator=(const ProcessWatch&) = delete;

  // Watches the process of this worker's incarnation, once however often it is asked for.
  // NOT_FOUND: it cannot be seen from here. RESOURCE_EXHAUSTED: too many are watched.
  absl::Status Watch(ProcessEnded worker, const server::ProcessIdentity& identity);

  // Returns once no call of `on_ended` is under way; not to be called from it. Idempotent.
  void Stop();

 private:
  struct Watched {
    runtime::UniqueFd process;
    ProcessEnded worker;
  };

  ProcessWatch(std::function<void(ProcessEnded)> on_ended, runtime::UniqueFd poll,
               runtime::UniqueFd stop);
  void Run();

  const std::function<void(ProcessEnded)> on_ended_;
  const runtime::UniqueFd poll_;
  const runtime::UniqueFd stop_;

  std::mutex mu_;
  std::uint64_t last_key_ = 0;                // guarded by mu_
  std::map<std::uint64_t, Watched> watched_;  // guarded by mu_

  std::thread thread_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_PROCESS_WATCH_H_
