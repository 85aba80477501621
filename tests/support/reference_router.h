// The three routers once more, in double precision and the plainest terms, to hold the runtime's
// against.
#ifndef EPSERVE_TESTS_SUPPORT_REFERENCE_ROUTER_H_
#define EPSERVE_TESTS_SUPPORT_REFERENCE_ROUTER_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "runtime/routing/router.h"

namespace epserve::testing {

struct ReferenceRouting {
  std::vector<std::int32_t> ids;  // [K], best first
  std::vector<double> weights;    // [K]
  double margin = 0.0;            // How far the closest decision was from going the other way.
};

// Indices by falling value, lower index first among equals.
inline std::vector<std::int32_t> Ranking(const std::vector<double>& values) {
  std::vector<std::int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return values[static_cast<std::size_t>(a)] > values[static_cast<std::size_t>(b)];
  });
  return order;
}

inline double Margin(const std::vector<double>& values, const std::vector<std::int32_t>& order,
                     int count) {
  // Among the chosen too, because their order is compared.
  double margin = std::numeric_limits<double>::infinity();
  for (int k = 0; k < count && static_cast<std::size_t>(k) + 1 < order.size(); ++k) {
    margin = std::min(margin,
                      values[static_cast<std::size_t>(order[static_cast<std::size_t>(k)])] -
                          values[static_cast<std::size_t>(order[static_cast<std::size_t>(k) + 1])]);
  }
  return margin;
}

// `x` [H], `gate` [E, H], `bias` [E] or empty.
inline ReferenceRouting RouteInDouble(const runtime::RouterConfig& config,
                                      const std::vector<double>& gate,
                                      const std::vector<double>& bias,
                                      const std::vector<double>& x) {
  const auto num_experts = static_cast<std::size_t>(config.num_experts);
  std::vector<double> scores(num_experts);
  for (std::size_t e = 0; e < num_experts; ++e) {
    for (std::size_t h = 0; h < x.size(); ++h) scores[e] += gate[e * x.size() + h] * x[h];
  }
  std::vector<double> choice;
  ReferenceRouting routing;
  routing.margin = std::numeric_limits<double>::infinity();
  if (config.kind == runtime::RouterKind::kSoftmax) {
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (double& score : scores) sum += score = std::exp(score - largest);
    for (double& score : scores) score /= sum;
    choice = scores;
  } else {
    for (double& score : scores) score = 1.0 / (1.0 + std::exp(-score));
    choice = scores;
    for (std::size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];
    const std::size_t size = num_experts / static_cast<std::size_t>(config.num_groups);
    std::vector<double> group_scores;
    for (std::size_t g = 0; g < static_cast<std::size_t>(config.num_groups); ++g) {
      std::vector<double> members(choice.begin() + static_cast<std::ptrdiff_t>(g * size),
                                  choice.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
      std::sort(members.rbegin(), members.rend());
      group_scores.push_back(members[0] + members[1]);
    }
    const std::vector<std::int32_t> groups = Ranking(group_scores);
    if (config.topk_groups < config.num_groups) {
      routing.margin = group_scores[static_cast<std::size_t>(
                           groups[static_cast<std::size_t>(config.topk_groups) - 1])] -
                       group_scores[static_cast<std::size_t>(
                           groups[static_cast<std::size_t>(config.topk_groups)])];
    }
    for (std::size_t i = static_cast<std::size_t>(config.topk_groups); i < groups.size(); ++i) {
      for (std::size_t m = 0; m < size; ++m) {
        choice[static_cast<std::size_t>(groups[i]) * size + m] =
            -std::numeric_limits<double>::infinity();
      }
    }
  }
  const std::vector<std::int32_t> order = Ranking(choice);
  routing.margin = std::min(routing.margin, Margin(choice, order, config.topk));
  double sum = 0.0;
  for (int k = 0; k < config.topk; ++k) {
    routing.ids.push_back(order[static_cast<std::size_t>(k)]);
    routing.weights.push_back(scores[static_cast<std::size_t>(routing.ids.back())]);
    sum += routing.weights.back();
  }
  for (double& weight : routing.weights) {
    if (config.renormalise) weight /= sum;
    weight *= config.scaling_factor;
  }
  return routing;
}

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_SUPPORT_REFERENCE_ROUTER_H_
