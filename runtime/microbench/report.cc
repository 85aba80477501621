#include "runtime/microbench/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace epserve::runtime {
namespace {

std::vector<double> PhaseSamplesUs(const Coordination& coordination, Phase phase) {
  const BenchParams& params = coordination.params();
  std::vector<double> samples;
  for (int i = 0; i < params.iterations; ++i) {
    TimeSpan all = coordination.span(phase, i, 0);
    for (int rank = 1; rank < params.num_ranks; ++rank) {
      const TimeSpan& span = coordination.span(phase, i, rank);
      all.begin_ns = std::min(all.begin_ns, span.begin_ns);
      all.end_ns = std::max(all.end_ns, span.end_ns);
    }
    samples.push_back(static_cast<double>(all.end_ns - all.begin_ns) / 1e3);
  }
  return samples;
}

// 0 where there is nothing to copy: one rank, or experts on one.
double Ratio(double value_us, double limit_us, std::uint64_t bytes) {
  return bytes == 0 || limit_us <= 0.0 ? 0.0 : value_us / limit_us;
}

}  // namespace

Percentiles PercentilesOf(std::vector<double> samples_us) {
  std::sort(samples_us.begin(), samples_us.end());
  const auto at = [&](double share) {
    const double rank = std::ceil(share * static_cast<double>(samples_us.size()));
    return samples_us[static_cast<std::size_t>(std::max(rank, 1.0)) - 1];
  };
  return {at(0.50), at(0.99)};
}

BenchReport MakeReport(const Coordination& coordination) {
  BenchReport report;
  report.params = coordination.params();
  report.copy = PercentilesOf(PhaseSamplesUs(coordination, Phase::kCopy));
  report.dispatch = PercentilesOf(PhaseSamplesUs(coordination, Phase::kDispatch));
  report.combine = PercentilesOf(PhaseSamplesUs(coordination, Phase::kCombine));
  std::int64_t remote_rows = 0;
  for (int rank = 0; rank < report.params.num_ranks; ++rank) {
    const RankEntry& entry = coordination.rank(rank);
    remote_rows += entry.remote_rows;
    report.verified_tokens += entry.verified_tokens;
    report.max_relative_error = std::max(report.max_relative_error, entry.max_relative_error);
    report.heap_bytes_per_rank = std::max(report.heap_bytes_per_rank, entry.heap_bytes);
  }
  report.remote_bytes_per_rank = static_cast<std::uint64_t>(remote_rows) * report.params.hidden *
                                 DataTypeBytes(report.params.dtype) / report.params.num_ranks;
  return report;
}

std::string FormatJson(const BenchReport& report) {
  const BenchParams& p = report.params;
  // Names and words below need no escaping.
  return absl::StrFormat(
      "{\"benchmark\":\"alltoallv\",\"version\":\"%s\",\"backend\":\"host\",\"ranks\":%d,"
      "\"tokens\":%d,\"hidden\":%d,\"topk\":%d,\"experts\":%d,\"dtype\":\"%s\","
      "\"iterations\":%d,\"warmup\":%d,\"seed\":%d,"
      "\"dispatch_us_p50\":%.1f,\"dispatch_us_p99\":%.1f,"
      "\"combine_us_p50\":%.1f,\"combine_us_p99\":%.1f,"
      "\"copy_limit_us\":%.1f,\"copy_limit_us_p99\":%.1f,"
      "\"dispatch_to_copy_limit\":%.3f,\"combine_to_copy_limit\":%.3f,"
      "\"remote_bytes_per_rank\":%d,\"heap_bytes_per_rank\":%d,"
      "\"verified_tokens\":%d,\"max_relative_error\":%.3g}",
      EPSERVE_VERSION, p.num_ranks, p.tokens_per_rank, p.hidden, p.topk, p.num_experts,
      std::string(DataTypeName(p.dtype)), p.iterations, p.warmup, p.seed, report.dispatch.p50_us,
      report.dispatch.p99_us, report.combine.p50_us, report.combine.p99_us, report.copy.p50_us,
      report.copy.p99_us,
      Ratio(report.dispatch.p50_us, report.copy.p50_us, report.remote_bytes_per_rank),
      Ratio(report.combine.p50_us, report.copy.p50_us, report.remote_bytes_per_rank),
      report.remote_bytes_per_rank, report.heap_bytes_per_rank, report.verified_tokens,
      report.max_relative_error);
}

std::string FormatTable(const BenchReport& report) {
  const BenchParams& p = report.params;
  const auto line = [&](const char* name, const Percentiles& times) {
    return absl::StrFormat(
        "%-12s %12.1f %12.1f %10.2f %14.2f\n", name, times.p50_us, times.p99_us,
        static_cast<double>(report.remote_bytes_per_rank) * p.num_ranks / times.p50_us / 1e3,
        Ratio(times.p50_us, report.copy.p50_us, report.remote_bytes_per_rank));
  };
  return absl::StrCat(
      absl::StrFormat("alltoallv host: %d ranks x %d tokens x %d %s, top-%d of %d experts, "
                      "%d iterations\n",
                      p.num_ranks, p.tokens_per_rank, p.hidden, std::string(DataTypeName(p.dtype)),
                      p.topk, p.num_experts, p.iterations),
      absl::StrFormat("rows to other ranks: %.1f MB per rank and phase; heap: %.1f MB per rank\n",
                      static_cast<double>(report.remote_bytes_per_rank) / 1e6,
                      static_cast<double>(report.heap_bytes_per_rank) / 1e6),
      absl::StrFormat("verified: %d tokens, largest relative error %.2g\n\n",
                      report.verified_tokens, report.max_relative_error),
      absl::StrFormat("%-12s %12s %12s %10s %14s\n", "phase", "p50 us", "p99 us", "GB/s, all",
                      "x plain copy"),
      line("plain copy", report.copy), line("dispatch", report.dispatch),
      line("combine", report.combine));
}

}  // namespace epserve::runtime
