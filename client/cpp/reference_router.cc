#include "client/cpp/reference_router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace epserve::client {

namespace {

std::vector<double> Softmax(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  std::vector<double> result(logits.size());
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) sum += result[i] = std::exp(logits[i] - top);
  for (double& value : result) value /= sum;
  return result;
}

// The `count` best of `candidates` by score; narrows `margin` to the gap behind the last of them.
std::vector<std::int64_t> Best(const std::vector<double>& scores,
                               std::vector<std::int64_t> candidates, std::int64_t count,
                               double& margin) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](std::int64_t a, std::int64_t b) { return scores[a] > scores[b]; });
  if (static_cast<std::size_t>(count) < candidates.size()) {
    const double last = scores[candidates[count - 1]];
    const double next = scores[candidates[count]];
    const double scale = std::max({std::fabs(last), std::fabs(next), 1e-300});
    margin = std::min(margin, (last - next) / scale);
  }
  candidates.resize(static_cast<std::size_t>(count));
  return candidates;
}

std::vector<std::int64_t> Numbers(std::int64_t count) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// The experts of the topk_groups groups whose two best choices sum highest.
std::vector<std::int64_t> ExpertsOfBestGroups(const ReferenceConfig& config,
                                              const std::vector<double>& choice, double& margin) {
  const std::int64_t group_size = config.num_experts / config.num_groups;
  std::vector<double> group_scores;
  for (std::int64_t group = 0; group < config.num_groups; ++group) {
    std::vector<double> members(choice.begin() + group * group_size,
                                choice.begin() + (group + 1) * group_size);
    std::sort(members.begin(), members.end(), std::greater<>());
    group_scores.push_back(members[0] + (group_size > 1 ? members[1] : 0.0));
  }
  std::vector<std::int64_t> groups =
      Best(group_scores, Numbers(config.num_groups), config.topk_groups, margin);
  std::sort(groups.begin(), groups.end());
  std::vector<std::int64_t> experts;
  for (const std::int64_t group : groups) {
    for (std::int64_t i = 0; i < group_size; ++i) experts.push_back(group * group_size + i);
  }
  return experts;
}

}  // namespace

TokenRoute RouteToken(const ReferenceConfig& config, const std::vector<double>& logits,
                      const std::vector<double>& bias) {
  TokenRoute route;
  route.margin = std::numeric_limits<double>::infinity();
  std::vector<double> scores;
  double epsilon = 0;
  if (config.architecture == Architecture::kDeepseekV3) {
    epsilon = 1e-20;
    std::vector<double> choice;
    for (std::size_t e = 0; e < logits.size(); ++e) {
      scores.push_back(1.0 / (1.0 + std::exp(-logits[e])));
      choice.push_back(scores[e] + bias[e]);
    }
    route.ids =
        Best(choice, ExpertsOfBestGroups(config, choice, route.margin), config.topk, route.margin);
  } else {
    scores = Softmax(logits);
    route.ids = Best(scores, Numbers(config.num_experts), config.topk, route.margin);
  }
  double sum = epsilon;
  for (const std::int64_t id : route.ids) sum += scores[id];
  for (const std::int64_t id : route.ids) {
    const double weight = config.normalise_topk ? scores[id] / sum : scores[id];
    route.weights.push_back(weight * config.routed_scaling_factor);
  }
  return route;
}

}  // namespace epserve::client
