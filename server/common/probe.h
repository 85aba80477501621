// The readiness probe: the small batch that must come back right before an epoch serves.
//
// Every rank computes FFN(probe row) of its probe expert by plain loops, apart from the batch path
// (Engine::ReferenceExpert), and sends the result with PeersOpened. The coordinator then sends one
// fp32 batch of probe rows through dispatch, experts and combine and holds it against the weighted
// sums of those results. Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COMMON_PROBE_H_
#define EPSERVE_SERVER_COMMON_PROBE_H_

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "runtime/routing/count_matrix.h"

namespace epserve::server {

// Largest relative L2 error of one row that passes, by the workers' backend. What is to be caught
// (a wrong peer, offset or expert) is off by order 1. CPU workers compute in fp32; rows and weights
// that a GPU takes in fp8 are off by up to 0.05.
constexpr double ProbeTolerance(std::string_view backend) { return backend == "host" ? 1e-3 : 0.1; }

// Element `index` of the probe row, in [-1, 1) and exact in fp32. All arithmetic wraps at 32 bits:
//   z = index * 0x9e3779b9 + 0x7f4a7c15
//   z = (z ^ (z >> 16)) * 0x85ebca6b;  z = (z ^ (z >> 13)) * 0xc2b2ae35;  z = z ^ (z >> 16)
//   value = (z >> 8) * 2^-23 - 1
float ProbeValue(std::uint32_t index);
std::vector<float> ProbeRow(std::int64_t hidden);  // [H]

// The expert that `rank` is probed by: its first; -1 where it owns none.
std::int64_t ProbeExpert(const runtime::Placement& placement, int rank);

// T = max(2R, 2) tokens, each the probe row. Of the ranks that own experts, token t goes to the
// min(K, their number) consecutive ones from the t-th on, wrapping round; the k-th has the weight
// 1 / (k + 2). Unused places are -1 with weight 0.
struct ProbeBatch {
  std::int64_t num_tokens = 0;
  std::vector<float> hidden;           // [T, H]
  std::vector<std::int32_t> topk_ids;  // [T, K]
  std::vector<float> topk_weights;     // [T, K]
};
std::int64_t NumProbeTokens(int num_ranks);
ProbeBatch MakeProbeBatch(const runtime::Placement& placement, std::int64_t hidden, int topk);

// OK if every row of `output` [T, H] is the weighted sum of the ranks' `probe_outputs` [R][H]
// within `tolerance`. INTERNAL names the first wrong row and the ranks it went to.
absl::Status VerifyProbe(const ProbeBatch& batch, const runtime::Placement& placement,
                         std::int64_t hidden, std::span<const std::vector<float>> probe_outputs,
                         std::span<const float> output, double tolerance);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_PROBE_H_
