// The three architectures' routers over given logits, in fp64 by plain loops, as HuggingFace's
// models define them:
//
//   Mixtral      p = softmax(logits); the K largest; weights p / sum of the chosen p
//   Qwen3-MoE    the same, divided by their sum only where norm_topk_prob says so
//   DeepSeek-V3  s = sigmoid(logits), c = s + e_score_correction_bias; a group's score is the sum
//   of
//                its two largest c; of the topk_group best groups the K experts of largest c;
//                weights are s (without the bias), divided by their sum + 1e-20 where
//                norm_topk_prob says so, times routed_scaling_factor
//
// Ties go to the lower number. Pure functions; safe from any thread.
#ifndef EPSERVE_CLIENT_CPP_REFERENCE_ROUTER_H_
#define EPSERVE_CLIENT_CPP_REFERENCE_ROUTER_H_

#include <cstdint>
#include <vector>

#include "client/cpp/reference_config.h"

namespace epserve::client {

struct TokenRoute {
  std::vector<std::int64_t> ids;  // [K], best first
  std::vector<double> weights;    // [K]
  // How far the decision is from another, relative to the scores compared: the smaller of the gap
  // between the last chosen and the first left out, among experts and among groups. Infinite where
  // nothing is left out. Below about 1e-6, arithmetic in fp32 may choose otherwise and be right.
  double margin = 0;
};

// `logits` [E]; `bias` [E] for DeepSeek-V3, else empty.
TokenRoute RouteToken(const ReferenceConfig& config, const std::vector<double>& logits,
                      const std::vector<double>& bias);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_REFERENCE_ROUTER_H_
