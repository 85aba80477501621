// What an operator asks of the coordinator: the cluster's state, placement and load, and to drain a
// worker.
//
// Thread safety: any number of threads at once. Errors are the server's, as absl::Status.
#ifndef EPSERVE_CLIENT_CPP_ADMIN_CLIENT_H_
#define EPSERVE_CLIENT_CPP_ADMIN_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/channel_security.h"

namespace epserve::client {

struct WorkerState {
  std::string worker_id;
  std::string node;
  std::int64_t pid = 0;
  int rank = -1;      // -1: standby
  std::string state;  // "loading", "loaded", "forming", "serving", "standby", "draining"
  std::int64_t first_expert = 0;
  std::int64_t num_experts = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t heap_bytes = 0;
  std::uint64_t resident_bytes = 0;
  double load_fraction = 0;  // of the weights, in [0, 1]
  std::uint64_t batches = 0;
  std::uint64_t expert_rows = 0;
  std::int64_t ms_since_heartbeat = 0;
  std::string backend;
};

struct ClusterState {
  std::string cluster_id;
  std::string version;
  std::string model;
  std::string state;  // "waiting", "forming", "probing", "serving", "draining"
  std::uint64_t epoch = 0;
  int expected_workers = 0;
  std::vector<WorkerState> workers;
  std::int64_t queued_requests = 0;
  std::int64_t queue_capacity = 0;
  std::int64_t batches_in_flight = 0;
  std::uint64_t requests_ok = 0;
  std::uint64_t requests_failed = 0;
  std::int64_t uptime_ms = 0;
  std::int64_t experts_without_worker = 0;
  std::int64_t num_experts = 0;
  std::string waiting_for;     // why no epoch starts; empty unless `state` is "waiting"
  std::string last_epoch_end;  // why the last epoch ended; empty once one serves
};

// Rank `rank` owns experts [first_expert, first_expert + num_experts) of every layer.
struct PlacementRange {
  int rank = 0;
  std::string worker_id;  // Empty: no live worker.
  std::int64_t first_expert = 0;
  std::int64_t num_experts = 0;
};

class AdminClient {
 public:
  // `max_reconnect_backoff` as in ClientOptions.
  explicit AdminClient(const std::string& target, const ChannelSecurity& security = {},
                       absl::Duration max_reconnect_backoff = absl::Seconds(1));
  ~AdminClient();
  AdminClient(const AdminClient&) = delete;
  AdminClient& operator=(const AdminClient&) = delete;

  absl::StatusOr<ClusterState> GetClusterStatus(absl::Duration timeout);
  absl::StatusOr<std::vector<PlacementRange>> GetPlacement(absl::Duration timeout);
  // [E] rows that each expert has taken; `layer` -1: summed over the layers.
  absl::StatusOr<std::vector<std::uint64_t>> GetExpertLoad(std::int64_t layer,
                                                           absl::Duration timeout);
  // Returns when the worker has finished its batches and left. NOT_FOUND: no such worker.
  absl::Status DrainWorker(const std::string& worker_id, absl::Duration timeout);

 private:
  struct Core;
  std::unique_ptr<Core> core_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_ADMIN_CLIENT_H_
