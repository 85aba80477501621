// `epserve bench`: load and its measurement.
#ifndef EPSERVE_CLIENT_COMMAND_BENCH_H_
#define EPSERVE_CLIENT_COMMAND_BENCH_H_

#include "absl/status/status.h"
#include "client/command/options.h"

namespace epserve::client {

// An error if any request failed, unless errors are allowed.
absl::Status RunBench(const BenchOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_BENCH_H_
