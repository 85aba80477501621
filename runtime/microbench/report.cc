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

const char* BackendName(const BenchParams& params) {
  switch (params.backend) {
    case BenchBackend::kCuda:
      return "cuda";
    case BenchBackend::kNccl:
      return "nccl";
    case BenchBackend::kHost:
      break;
  }
  return "host";
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
  const auto measured = [&](Phase phase) {
    return PercentilesOf(PhaseSamplesUs(coordination, phase));
  };
  const bool device = report.params.backend != BenchBackend::kHost;
  report.copy = measured(Phase::kCopy);
  report.dispatch = measured(Phase::kDispatch);
  report.combine_copy = measured(device ? Phase::kCombineCopy : Phase::kCopy);
  report.combine = measured(Phase::kCombine);
  if (report.params.decode) report.pair = measured(Phase::kPair);
  for (int rank = 0; rank < report.params.num_ranks; ++rank) {
    const RankEntry& entry = coordination.rank(rank);
    report.remote_bytes_per_rank += entry.dispatch_bytes;
    report.combine_remote_bytes_per_rank += entry.combine_bytes;
    report.verified_tokens += entry.verified_tokens;
    report.max_relative_error = std::max(report.max_relative_error, entry.max_relative_error);
    report.heap_bytes_per_rank = std::max(report.heap_bytes_per_rank, entry.heap_bytes);
  }
  report.remote_bytes_per_rank /= static_cast<std::uint64_t>(report.params.num_ranks);
  report.combine_remote_bytes_per_rank /= static_cast<std::uint64_t>(report.params.num_ranks);
  return report;
}

std::string FormatJson(const BenchReport& report) {
  const BenchParams& p = report.params;
  // Names and words below need no escaping.
  std::string json = absl::StrFormat(
      "{\"benchmark\":\"alltoallv\",\"version\":\"%s\",\"backend\":\"%s\",\"ranks\":%d,"
      "\"tokens\":%d,\"hidden\":%d,\"topk\":%d,\"experts\":%d,\"dtype\":\"%s\","
      "\"iterations\":%d,\"warmup\":%d,\"seed\":%d,"
      "\"dispatch_us_p50\":%.1f,\"dispatch_us_p99\":%.1f,"
      "\"combine_us_p50\":%.1f,\"combine_us_p99\":%.1f,"
      "\"copy_limit_us\":%.1f,\"copy_limit_us_p99\":%.1f,\"combine_copy_limit_us\":%.1f,"
      "\"dispatch_to_copy_limit\":%.3f,\"combine_to_copy_limit\":%.3f,"
      "\"remote_bytes_per_rank\":%d,\"combine_remote_bytes_per_rank\":%d,"
      "\"heap_bytes_per_rank\":%d,\"verified_tokens\":%d,\"max_relative_error\":%.3g",
      EPSERVE_VERSION, BackendName(p), p.num_ranks, p.tokens_per_rank, p.hidden, p.topk,
      p.num_experts, std::string(DataTypeName(p.dtype)), p.iterations, p.warmup, p.seed,
      report.dispatch.p50_us, report.dispatch.p99_us, report.combine.p50_us, report.combine.p99_us,
      report.copy.p50_us, report.copy.p99_us, report.combine_copy.p50_us,
      Ratio(report.dispatch.p50_us, report.copy.p50_us, report.remote_bytes_per_rank),
      Ratio(report.combine.p50_us, report.combine_copy.p50_us,
            report.combine_remote_bytes_per_rank),
      report.remote_bytes_per_rank, report.combine_remote_bytes_per_rank,
      report.heap_bytes_per_rank, report.verified_tokens, report.max_relative_error);
  if (p.backend != BenchBackend::kHost) {
    absl::StrAppendFormat(&json,
                          ",\"mode\":\"%s\",\"fp8\":%s,\"comm_blocks\":%d,\"push_blocks\":%d,"
                          "\"reduce_blocks\":%d,\"line_tokens\":%d",
                          p.decode ? "decode" : "prefill", p.fp8 ? "true" : "false", p.comm_blocks,
                          p.push_blocks, p.reduce_blocks, p.line_tokens);
  }
  if (p.decode) {
    absl::StrAppendFormat(&json, ",\"pair_us_p50\":%.1f,\"pair_us_p99\":%.1f", report.pair.p50_us,
                          report.pair.p99_us);
  }
  return json + "}";
}

std::string FormatTable(const BenchReport& report) {
  const BenchParams& p = report.params;
  const auto line = [&](const char* name, const Percentiles& times, std::uint64_t bytes,
                        const Percentiles& limit) {
    return absl::StrFormat("%-14s %12.1f %12.1f %10.2f %14.2f\n", name, times.p50_us, times.p99_us,
                           static_cast<double>(bytes) * p.num_ranks / times.p50_us / 1e3,
                           Ratio(times.p50_us, limit.p50_us, bytes));
  };
  std::string table = absl::StrCat(
      absl::StrFormat("alltoallv %s%s%s: %d ranks x %d tokens x %d %s, top-%d of %d experts, "
                      "%d iterations\n",
                      BackendName(p), p.decode ? " decode" : "", p.fp8 ? " fp8 dispatch" : "",
                      p.num_ranks, p.tokens_per_rank, p.hidden, std::string(DataTypeName(p.dtype)),
                      p.topk, p.num_experts, p.iterations),
      absl::StrFormat("rows to other ranks: %.1f MB per rank in dispatch, %.1f MB in combine; "
                      "heap: %.1f MB per rank\n",
                      static_cast<double>(report.remote_bytes_per_rank) / 1e6,
                      static_cast<double>(report.combine_remote_bytes_per_rank) / 1e6,
                      static_cast<double>(report.heap_bytes_per_rank) / 1e6),
      absl::StrFormat("verified: %d tokens, largest relative error %.2g\n\n",
                      report.verified_tokens, report.max_relative_error),
      absl::StrFormat("%-14s %12s %12s %10s %14s\n", "phase", "p50 us", "p99 us", "GB/s, all",
                      "x plain copy"),
      line("plain copy", report.copy, report.remote_bytes_per_rank, report.copy),
      line("dispatch", report.dispatch, report.remote_bytes_per_rank, report.copy),
      line("combine", report.combine, report.combine_remote_bytes_per_rank, report.combine_copy));
  if (p.decode) {
    absl::StrAppendFormat(&table, "%-14s %12.1f %12.1f\n", "both, in a row", report.pair.p50_us,
                          report.pair.p99_us);
  }
  return table;
}

}  // namespace epserve::runtime
