// The measuring side of an echo: round trips one after another, and many at once.
#ifndef EPSERVE_SERVER_MICROBENCH_ECHO_CLIENT_H_
#define EPSERVE_SERVER_MICROBENCH_ECHO_CLIENT_H_

#include <grpcpp/completion_queue.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/microbench/report.h"

namespace epserve::microbench {

enum class CallKind { kStream, kUnary };

// Waits for the next event of `queue`, at most so long that a peer which died is found out.
// UNAVAILABLE: it has not come, or what it tells of has failed; `what` stands in the message.
absl::Status NextEvent(grpc::CompletionQueue& queue, const char* what, void** tag);

double UsSince(std::chrono::steady_clock::time_point begin);

// `iterations` echoes of `bytes`, one after another, on one stream or a call each; `warmup` more
// before them.
absl::StatusOr<runtime::Percentiles> MeasureRoundTrips(const std::string& target, CallKind kind,
                                                       std::int64_t bytes, int warmup,
                                                       int iterations);

// `requests` echoes of `bytes`, `concurrency` of them under way at any time, each on a stream of
// its own or as a call: how many a second. From one thread, or from one that waits for each, as the
// callers of `epserve bench` do.
enum class Callers { kOneThread, kThreads };
absl::StatusOr<double> MeasureThroughput(const std::string& target, CallKind kind, Callers callers,
                                         std::int64_t bytes, int concurrency, int requests);

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_ECHO_CLIENT_H_
