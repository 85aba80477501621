// The coordinator's numbers, in Prometheus' text format. Thread-safe: every call may come from any
// thread and none blocks on I/O. Names and labels are a contract (README); renaming breaks
// dashboards.
#ifndef EPSERVE_SERVER_COORDINATOR_METRICS_H_
#define EPSERVE_SERVER_COORDINATOR_METRICS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

enum class PhaseMetric { kQueue, kAssign, kCounts, kDispatch, kFfn, kCombine, kReply };
inline constexpr int kNumPhaseMetrics = 7;

// How bytes got from or to clients' shared memory: by the workers, or through the coordinator.
enum class RegionWay { kDirect, kCopied, kDevice };
inline constexpr int kNumRegionWays = 3;

// How bytes of outputs get into replies: sent from where the workers wrote them, or copied first.
enum class OutputWay { kLent, kCopied };
inline constexpr int kNumOutputWays = 2;

// Why callers are turned away before anybody looks at what they ask for: too many connections have
// calls under way; their certificate or secret does not do; no TLS connection came about; they hold
// the memory of messages that are not whole; they are workers that may not join.
enum class RefusalReason { kMaxConnections, kAccess, kHandshake, kHalfMessages, kWorker };
inline constexpr int kNumRefusalReasons = 5;

class Metrics {
 public:
  explicit Metrics(std::int64_t num_experts);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // `code` gives the label: "ok", "unavailable", "resource_exhausted", ...
  void AddRequest(absl::StatusCode code, double seconds);
  // All requests that have been answered, refused ones too.
  struct RequestTotals {
    std::uint64_t ok = 0;
    std::uint64_t failed = 0;
  };
  RequestTotals request_totals() const;
  void AddTokens(std::int64_t num_tokens);
  void AddBatch(CountExchange exchange);  // one that was answered
  void AddRegionBytes(RegionWay way, std::int64_t bytes);
  void AddOutputBytes(OutputWay way, std::int64_t bytes);
  void ObservePhase(PhaseMetric phase, double seconds);
  void AddExpertRows(std::int64_t expert, std::int64_t rows);
  void SetQueueDepth(std::int64_t depth);
  void SetEpoch(std::uint64_t epoch);
  void SetServing(bool serving);  // what health says of the service
  void AddRefusal(RefusalReason reason);
  // Workers by state; states not among `counts` become 0.
  void SetWorkers(const std::vector<std::pair<std::string, int>>& counts);
  // Workers' heaps, each by what its peers open it by; what is none of the README's is "other".
  void SetHeaps(const std::vector<std::string>& handle_types);
  void SetBatchesInFlight(std::int64_t batches);

  std::string Render() const;  // what a scrape gets

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

// "ok", "deadline_exceeded", ...
std::string OutcomeLabel(absl::StatusCode code);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_METRICS_H_
