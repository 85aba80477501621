// Starts one process a rank, watches them, and collects their figures.
#ifndef EPSERVE_RUNTIME_MICROBENCH_LAUNCHER_H_
#define EPSERVE_RUNTIME_MICROBENCH_LAUNCHER_H_

#include "absl/status/statusor.h"
#include "runtime/microbench/report.h"

namespace epserve::runtime {

// Runs the whole measurement. INVALID_ARGUMENT: parameters that do not fit each other. A rank that
// fails or dies ends the others, and its error is returned. Leaves no process and no segment.
absl::StatusOr<BenchReport> RunAllToAllV(BenchParams params);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_LAUNCHER_H_
