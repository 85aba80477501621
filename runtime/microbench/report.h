// From time stamps to figures, and from figures to what is printed. Pure functions.
#ifndef EPSERVE_RUNTIME_MICROBENCH_REPORT_H_
#define EPSERVE_RUNTIME_MICROBENCH_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/microbench/coordination.h"

namespace epserve::runtime {

struct Percentiles {
  double p50_us = 0.0;
  double p99_us = 0.0;
};

struct BenchReport {
  BenchParams params;
  Percentiles copy;  // plain copies of dispatch's bytes
  Percentiles dispatch;
  Percentiles
      combine_copy;  // and of combine's; measured apart on cuda, where fp8 makes them differ
  Percentiles combine;
  Percentiles pair;  // dispatch and combine back to back; cuda's decode path alone
  // Bytes of rows that cross between ranks, the mean over ranks. The copies carry exactly these.
  std::uint64_t remote_bytes_per_rank = 0;          // in dispatch
  std::uint64_t combine_remote_bytes_per_rank = 0;  // in combine
  std::uint64_t heap_bytes_per_rank = 0;
  std::int64_t verified_tokens = 0;
  double max_relative_error = 0.0;
};

// Nearest-rank percentiles. REQUIRES: not empty.
Percentiles PercentilesOf(std::vector<double> samples_us);

// A phase lasts from the first rank's begin to the last rank's end.
BenchReport MakeReport(const Coordination& coordination);

std::string FormatJson(const BenchReport& report);   // one line
std::string FormatTable(const BenchReport& report);  // for people

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_REPORT_H_
