// A timeline of a bench run, in the format that Perfetto and chrome://tracing open: a row of
// requests for each that was under way at once, and a row of phases for each worker, on one clock.
#ifndef EPSERVE_CLIENT_COMMAND_BENCH_TRACE_H_
#define EPSERVE_CLIENT_COMMAND_BENCH_TRACE_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/command/load_generator.h"

namespace epserve::client {

// The JSON text of the samples that carry a trace; the earliest request is at 0.
std::string BenchTrace(const std::vector<Sample>& samples);

// Before the load: INVALID_ARGUMENT if the file cannot be written there.
absl::Status CheckBenchTrace(const std::string& path);
// INTERNAL: the file cannot be written.
absl::Status WriteBenchTrace(const std::string& path, const std::vector<Sample>& samples);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_BENCH_TRACE_H_
