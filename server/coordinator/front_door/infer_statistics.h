// What ModelStatistics reports: how many requests ended how, and where their time went.
// Thread-safe; a snapshot is one moment's, so that its counts agree with each other.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_STATISTICS_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_STATISTICS_H_

#include <chrono>
#include <cstdint>
#include <mutex>

#include "server/coordinator/front_door/request_sink.h"

namespace epserve::coordinator {

struct DurationTotal {
  std::uint64_t count = 0;
  std::uint64_t ns = 0;
};

struct StatisticsSnapshot {
  std::uint64_t last_inference_ms = 0;  // since the Unix epoch; 0: none
  DurationTotal success;                // arrival to answer
  DurationTotal fail;
  DurationTotal queue;           // this and below: of requests that succeeded
  DurationTotal compute_input;   // shards to their workers, counts, dispatch
  DurationTotal compute_infer;   // experts
  DurationTotal compute_output;  // combine
};

class InferStatistics {
 public:
  void Add(bool succeeded, std::chrono::nanoseconds server_time, const InferTimes& times);
  StatisticsSnapshot Snapshot() const;

 private:
  mutable std::mutex mutex_;
  StatisticsSnapshot totals_;  // Guarded by mutex_.
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_STATISTICS_H_
