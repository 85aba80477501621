// Routing by the checkpoint's own router, where a request comes without ids: scores of every expert
// for every token, and the top-k of them, as the HuggingFace implementations of Mixtral, Qwen3-MoE
// and DeepSeek-V3 choose and weigh them. fp32; ties go to the lower id, so the choice is
// deterministic. Pure functions, safe from any thread.
#ifndef EPSERVE_RUNTIME_ROUTING_ROUTER_H_
#define EPSERVE_RUNTIME_ROUTING_ROUTER_H_

#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace epserve::runtime {

enum class RouterKind : std::uint8_t {
  kSoftmax,         // Mixtral, Qwen3-MoE: softmax over all experts, then the top-k
  kGroupedSigmoid,  // DeepSeek-V3: sigmoid, correction bias for the choice, groups first
};

struct RouterConfig {
  RouterKind kind = RouterKind::kSoftmax;
  std::int64_t hidden = 0;       // H
  std::int64_t num_experts = 0;  // E
  int topk = 0;                  // K
  bool renormalise = true;       // Divide the K weights by their sum.
  // Of kGroupedSigmoid alone.
  int num_groups = 1;           // Groups of E / num_groups consecutive experts.
  int topk_groups = 1;          // Groups an expert may be chosen from.
  float scaling_factor = 1.0f;  // Multiplies the weights.
};

// Refuses what no router can do (K > E, uneven groups, fewer experts in the chosen groups than K).
// INVALID_ARGUMENT names the value.
absl::Status ValidateRouterConfig(const RouterConfig& config);

// Floats that RouteRows needs as scratch.
std::int64_t RouterScratchFloats(const RouterConfig& config);

// Routes `num_rows` rows. Every row depends on itself alone. A row with a score that is NaN gets
// the ids 0..K-1 with NaN weights: its output is NaN, and every id is in range. REQUIRES: config
// valid; x [num_rows, H]; gate [E, H]; bias [E] or null (kGroupedSigmoid: zeros); scratch of
// RouterScratchFloats; ids and weights [num_rows, K], overwritten.
void RouteRows(const RouterConfig& config, const float* gate, const float* bias, const float* x,
               std::int64_t num_rows, std::span<float> scratch, std::int32_t* ids, float* weights);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ROUTING_ROUTER_H_
