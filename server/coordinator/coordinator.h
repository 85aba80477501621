// The whole coordinator in one object: state machine and host, the gRPC server with every service,
// metrics. What main() runs and what tests start in their own process.
//
// Thread-safe. Start-up is all or nothing: where Create() fails, nothing is served or left behind.
#ifndef EPSERVE_SERVER_COORDINATOR_COORDINATOR_H_
#define EPSERVE_SERVER_COORDINATOR_COORDINATOR_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/checkpoint/model_info.h"
#include "server/coordinator/metrics.h"
#include "server/coordinator/options.h"

namespace epserve::coordinator {

class Coordinator {
 public:
  // What options do not say; tests shorten it.
  struct Pace {
    // See Config::epoch_pace_us and Config::probe_backoff_us.
    std::int64_t epoch_pace_us = 1'000'000;
    std::int64_t probe_backoff_us = 1'000'000;
    // A control stream that has said no Hello by then is closed.
    std::int64_t hello_timeout_ms = 5000;
  };

  // Binds and serves. `on_drained` is called once after Drain(), from another thread.
  // UNAVAILABLE: an address cannot be bound, or another server answers at a Unix socket.
  static absl::StatusOr<std::unique_ptr<Coordinator>> Create(const Options& options,
                                                             const runtime::ModelInfo& model,
                                                             std::function<void()> on_drained,
                                                             Pace pace);
  ~Coordinator();  // Stops.

  // Not ready; accepted requests finish, bounded by --drain-timeout-ms.
  void Drain();
  // Ends every stream and call, and the server.
  void Stop();

  // Bound ports, by --listen; 0 for a Unix socket.
  const std::vector<int>& ports() const;
  int metrics_port() const;  // 0 where nothing is served
  const Metrics& metrics() const;

 private:
  struct Parts;
  explicit Coordinator(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_COORDINATOR_H_
