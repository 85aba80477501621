// Callers that are turned away before anybody looks at their request: each is counted, and told of
// in the log once a minute for each host and reason, however often it comes back. Thread-safe.
#ifndef EPSERVE_SERVER_COORDINATOR_REFUSALS_H_
#define EPSERVE_SERVER_COORDINATOR_REFUSALS_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/common/log_limit.h"
#include "server/coordinator/metrics.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

class Refusals {
 public:
  // `metrics` outlives it.
  explicit Refusals(Metrics* metrics) : metrics_(metrics) {}

  // `status` refuses a call of, or a scrape by, `peer`.
  void OnAccess(std::string_view method, const std::string& peer, const absl::Status& status);
  // A call of `peer` found as many connections with calls under way as there may be.
  void OnMaxConnections(const std::string& peer);
  // The connection of `peer` was ended because so much of its messages' halves lay here.
  void OnHalfMessages(const std::string& peer, std::uint64_t num_bytes);
  // A worker may not join, for the reason `status`: it is told to end, or to come back later.
  // Worker ids do not make reasons differ.
  enum class Worker { kRejected, kTurnedAway };
  void OnWorker(Worker what, const HelloInfo& hello, const absl::Status& status);
  // A TLS handshake has failed just now. Who with is not told by gRPC, but its connection is still
  // there: `find_peers`, called within and not for every failure, gives those that may be it.
  using FindPeers = std::function<std::vector<std::string>()>;
  using TimePoint = std::chrono::steady_clock::time_point;
  void OnHandshake(std::string_view cause, const FindPeers& find_peers,
                   TimePoint now = std::chrono::steady_clock::now());

 private:
  bool MayLook(TimePoint now);

  Metrics* const metrics_;
  server::LogLimit limit_;
  server::LogLimit worker_limit_;  // Its reasons quote the worker, which could make up many.
  std::mutex mutex_;
  TimePoint second_began_;  // Guarded by mutex_, as the next.
  int num_looks_ = 0;       // since then
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_REFUSALS_H_
