// Measures the CUDA feed-forward on the current machine's first GPU, beside cuBLAS and a copy.
#ifndef EPSERVE_RUNTIME_MICROBENCH_FFN_BENCH_H_
#define EPSERVE_RUNTIME_MICROBENCH_FFN_BENCH_H_

#include "absl/status/statusor.h"
#include "runtime/microbench/ffn_report.h"

namespace epserve::runtime {

// UNAVAILABLE: no GPU, or a build without CUDA. INTERNAL: the result is wrong.
absl::StatusOr<FfnBenchReport> RunFfnBench(const FfnBenchParams& params);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_FFN_BENCH_H_
