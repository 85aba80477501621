#include "runtime/microbench/ffn_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace epserve::runtime {
namespace {

double PerSecond(double amount, double us) { return us > 0.0 ? amount / us * 1e6 : 0.0; }

const char* DistributionName(const FfnBenchParams& params) {
  return params.distribution == RowDistribution::kEven ? "even" : "skewed";
}

struct Rates {
  double tflops, grouped_tflops, dense_tflops, weight_gbps;
};

Rates RatesOf(const FfnBenchReport& r) {
  return {PerSecond(r.flops(), r.ffn.p50_us) / 1e12, PerSecond(r.flops(), r.grouped_us) / 1e12,
          PerSecond(r.flops(), r.dense_us) / 1e12,
          PerSecond(static_cast<double>(r.weight_bytes), r.ffn.p50_us) / 1e9};
}

}  // namespace

double FfnBenchReport::flops() const {
  return 6.0 * static_cast<double>(params.rows) * static_cast<double>(params.hidden) *
         static_cast<double>(params.intermediate);
}

std::vector<std::int32_t> FfnExpertOffsets(const FfnBenchParams& params) {
  std::vector<double> share(static_cast<std::size_t>(params.experts), 1.0);
  if (params.distribution == RowDistribution::kSkewed) {
    for (std::size_t e = 0; e < share.size(); ++e) share[e] = 1.0 / static_cast<double>(e + 1);
    std::mt19937_64 random(params.seed);
    std::shuffle(share.begin(), share.end(), random);
  }
  const double total = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<std::int32_t> offsets = {0};
  double sum = 0.0;
  for (const double s : share) {
    sum += s;
    offsets.push_back(
        static_cast<std::int32_t>(std::lround(static_cast<double>(params.rows) * sum / total)));
  }
  offsets.back() = static_cast<std::int32_t>(params.rows);
  return offsets;
}

std::string FormatFfnJson(const FfnBenchReport& r) {
  const FfnBenchParams& p = r.params;
  const Rates rates = RatesOf(r);
  // Names and words below need no escaping.
  return absl::StrFormat(
      "{\"benchmark\":\"ffn\",\"version\":\"%s\",\"kernel\":\"%s\",\"rows\":%d,\"experts\":%d,"
      "\"hidden\":%d,\"intermediate\":%d,\"weights\":\"%s\",\"distribution\":\"%s\","
      "\"iterations\":%d,\"warmup\":%d,\"seed\":%d,\"ffn_us_p50\":%.1f,\"ffn_us_p99\":%.1f,"
      "\"tflops\":%.1f,\"weight_gbps\":%.1f,\"grouped_tflops\":%.1f,\"dense_tflops\":%.1f,"
      "\"copy_gbps\":%.1f,\"tflops_to_dense\":%.3f,\"weight_gbps_to_copy\":%.3f,"
      "\"weight_bytes\":%d,\"workspace_bytes\":%d,\"verified_rows\":%d,\"relative_error\":%.3g}",
      EPSERVE_VERSION, r.kernel, p.rows, p.experts, p.hidden, p.intermediate,
      std::string(DataTypeName(p.weights)), DistributionName(p), p.iterations, p.warmup, p.seed,
      r.ffn.p50_us, r.ffn.p99_us, rates.tflops, rates.weight_gbps, rates.grouped_tflops,
      rates.dense_tflops, r.copy_gbps, rates.tflops / rates.dense_tflops,
      rates.weight_gbps / r.copy_gbps, r.weight_bytes, r.workspace_bytes, r.verified_rows,
      r.relative_error);
}

std::string FormatFfnTable(const FfnBenchReport& r) {
  const FfnBenchParams& p = r.params;
  const Rates rates = RatesOf(r);
  std::string table = absl::StrCat(
      absl::StrFormat("ffn %s: %d rows (%s) over %d experts, %d x %d %s, %d iterations\n", r.kernel,
                      p.rows, DistributionName(p), p.experts, p.hidden, p.intermediate,
                      std::string(DataTypeName(p.weights)), p.iterations),
      absl::StrFormat("weights: %.1f MB; workspace: %.1f MB\n",
                      static_cast<double>(r.weight_bytes) / 1e6,
                      static_cast<double>(r.workspace_bytes) / 1e6),
      absl::StrFormat("verified: %d rows, largest relative error %.2g\n\n", r.verified_rows,
                      r.relative_error),
      absl::StrFormat("%-22s %12s %12s %10s %14s\n", "", "p50 us", "p99 us", "TFLOP/s",
                      "weights GB/s"),
      absl::StrFormat("%-22s %12.1f %12.1f %10.1f %14.1f\n", "ffn", r.ffn.p50_us, r.ffn.p99_us,
                      rates.tflops, rates.weight_gbps));
  if (r.grouped_us > 0.0) {
    absl::StrAppendFormat(&table, "%-22s %12.1f %12s %10.1f\n", "cuBLAS grouped, bf16",
                          r.grouped_us, "", rates.grouped_tflops);
  }
  absl::StrAppendFormat(&table, "%-22s %12.1f %12s %10.1f\n", "cuBLAS dense, bf16", r.dense_us, "",
                        rates.dense_tflops);
  absl::StrAppendFormat(&table, "%-22s %50.1f\n", "device copy", r.copy_gbps);
  return table;
}

}  // namespace epserve::runtime
