// What one rank exchanges, and the check of what comes back. A stand-in for the experts makes the
// result easy to know: expert e multiplies a row by 1 + e / E. Pure but for the memory it owns.
#ifndef EPSERVE_RUNTIME_MICROBENCH_WORKLOAD_H_
#define EPSERVE_RUNTIME_MICROBENCH_WORKLOAD_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/alltoallv/exchange.h"
#include "runtime/microbench/coordination.h"

namespace epserve::runtime {

// Random ids of `rank` [T, K], all different in a row; the same for whoever asks with one seed.
std::vector<std::int32_t> RandomIds(const BenchParams& params, int rank);

// All ranks' matrix.
CountMatrix CountAll(const BenchParams& params, const Placement& placement);

// One rank's tokens.
struct Workload {
  std::vector<std::byte> x;            // [T, H] dtype
  std::vector<std::int32_t> topk_ids;  // [T, K]
  std::vector<float> topk_weights;     // [T, K] positive, a row's sum is 1
};
Workload MakeWorkload(const BenchParams& params, int rank);

// Plays the experts: fills partial_rows.
void RunStandInExperts(const BenchParams& params, std::int64_t first_expert,
                       const ReceivedRows& received);

// The largest relative L2 error of any row of `out` [T, H] dtype against the plain result in fp64.
// A NaN counts as infinite.
double MaxRelativeError(const BenchParams& params, const Workload& workload,
                        const std::vector<std::byte>& out);

// What rounding of partial rows and output may cost at most.
double ErrorLimit(DataType dtype);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_WORKLOAD_H_
