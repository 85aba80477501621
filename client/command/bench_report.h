// What a bench run comes to: counts, throughput, percentiles; as tables and as JSON. Pure functions
// of the samples.
#ifndef EPSERVE_CLIENT_COMMAND_BENCH_REPORT_H_
#define EPSERVE_CLIENT_COMMAND_BENCH_REPORT_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "client/command/load_generator.h"
#include "client/command/options.h"
#include "client/command/terminal.h"
#include "nlohmann/json_fwd.hpp"

namespace epserve::client {

struct Percentiles {
  double p50 = 0, p90 = 0, p99 = 0, max = 0, mean = 0;  // us
};

// Nearest rank: the smallest value that at least that share of the values does not exceed. Zeros
// for no values.
Percentiles PercentilesOf(std::vector<double> values_us);

struct BenchReport {
  std::int64_t requests = 0;
  std::int64_t succeeded = 0;
  std::map<std::string, std::int64_t> errors;  // by code's name
  std::map<std::string, std::string> first_message;
  double seconds = 0;
  double requests_per_second = 0;  // Those that succeeded.
  double tokens_per_second = 0;
  Percentiles request;   // As the client saw it.
  Percentiles overhead;  // request less epserve_ffn_us
  // The service's own times by phase: queue, assign, counts, dispatch, ffn, combine, server.
  std::vector<std::pair<std::string, Percentiles>> phases;
};

BenchReport MakeBenchReport(const LoadResult& result, std::int64_t tokens_per_request);

std::string RenderBenchReport(const BenchReport& report, const Terminal& terminal);
// `busy_poll_us`: how long the client looked.
nlohmann::ordered_json BenchJson(const BenchOptions& options, std::int64_t busy_poll_us,
                                 const BenchReport& report);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_BENCH_REPORT_H_
