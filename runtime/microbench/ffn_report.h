// What `epserve-microbench ffn` measures, and how it is printed. Pure functions.
#ifndef EPSERVE_RUNTIME_MICROBENCH_FFN_REPORT_H_
#define EPSERVE_RUNTIME_MICROBENCH_FFN_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/base/dtype.h"
#include "runtime/microbench/report.h"

namespace epserve::runtime {

enum class RowDistribution { kEven, kSkewed };
enum class FfnKernelChoice { kAuto, kHopper, kPortable };

struct FfnBenchParams {
  std::int64_t rows = 4096;
  int experts = 64;  // of this rank
  std::int64_t hidden = 2048;
  std::int64_t intermediate = 1024;
  DataType weights = DataType::kBf16;
  RowDistribution distribution = RowDistribution::kEven;
  FfnKernelChoice kernel = FfnKernelChoice::kAuto;
  int iterations = 30;
  int warmup = 5;
  std::uint64_t seed = 1;
};

struct FfnBenchReport {
  FfnBenchParams params;
  std::string kernel;
  Percentiles ffn;
  double grouped_us = 0.0;  // cuBLAS's grouped bf16 products alone, no SwiGLU; 0: not measured
  double dense_us = 0.0;    // cuBLAS's dense bf16 products of the same size
  double copy_gbps = 0.0;   // read and written bytes of a device-to-device copy
  std::uint64_t weight_bytes = 0;     // of the experts that have rows
  std::uint64_t workspace_bytes = 0;  // of the feed-forward
  int verified_rows = 0;
  double relative_error = 0.0;  // the largest of a sampled row

  double flops() const;  // of both products
};

// First row of each expert, and the end: even shares, or shares as 1 / (1 + e), dealt to experts in
// the seed's order.
std::vector<std::int32_t> FfnExpertOffsets(const FfnBenchParams& params);

std::string FormatFfnJson(const FfnBenchReport& report);   // one line
std::string FormatFfnTable(const FfnBenchReport& report);  // for people

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_FFN_REPORT_H_
