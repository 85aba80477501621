// A server with a stream to each of several clients, as a coordinator has to its workers: what it
// takes to tell all of them something and to hear from the last.
#ifndef EPSERVE_SERVER_MICROBENCH_FAN_OUT_H_
#define EPSERVE_SERVER_MICROBENCH_FAN_OUT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/microbench/report.h"

namespace epserve::microbench {

// Serves at `address` (unix:PATH, or HOST:0 for any port), starts `num_workers` processes that call
// it, and ends them. `iterations` rounds of `bytes` each way, after `warmup` more.
absl::StatusOr<runtime::Percentiles> MeasureFanOut(const std::string& address, int num_workers,
                                                   std::int64_t bytes, int warmup, int iterations);

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_FAN_OUT_H_
