#include "client/command/drain.h"

#include <cstdio>

#include "absl/time/time.h"
#include "client/cpp/admin_client.h"
#include "client/cpp/status.h"

namespace epserve::client {

absl::Status RunDrain(const DrainOptions& options) {
  AdminClient admin(options.server, options.security);
  EPC_RETURN_IF_ERROR(admin.DrainWorker(options.worker_id, absl::Seconds(options.timeout_s)));
  std::printf("%s has finished its batches and left\n", options.worker_id.c_str());
  return absl::OkStatus();
}

}  // namespace epserve::client
