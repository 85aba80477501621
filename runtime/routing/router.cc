#include "runtime/routing/router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "runtime/base/simd.h"

namespace epserve::runtime {
namespace {

// Sixteen fp32 lanes; the compiler lowers it to what the machine has.
typedef float Lanes __attribute__((vector_size(64)));
constexpr std::int64_t kLanes = 16;
// Experts whose dot products run together, so that the row is read once for all of them.
constexpr std::int64_t kExpertBlock = 4;

// logits [E] = gate [E, H] . x [H]. The order of the sum is fixed by H alone.
EPS_MULTIVERSION void Logits(const float* gate, const float* x, std::int64_t num_experts,
                             std::int64_t hidden, float* logits) {
  const std::int64_t whole = hidden - hidden % kLanes;
  for (std::int64_t begin = 0; begin < num_experts; begin += kExpertBlock) {
    const std::int64_t count = std::min(kExpertBlock, num_experts - begin);
    // A short last block computes its first expert again in the unused places.
    const float* rows[kExpertBlock];
    for (std::int64_t e = 0; e < kExpertBlock; ++e) {
      rows[e] = gate + (begin + (e < count ? e : 0)) * hidden;
    }
    Lanes sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    for (std::int64_t h = 0; h < whole; h += kLanes) {
      Lanes value, weight;
      std::memcpy(&value, x + h, sizeof(value));
      std::memcpy(&weight, rows[0] + h, sizeof(weight));
      sum0 += value * weight;
      std::memcpy(&weight, rows[1] + h, sizeof(weight));
      sum1 += value * weight;
      std::memcpy(&weight, rows[2] + h, sizeof(weight));
      sum2 += value * weight;
      std::memcpy(&weight, rows[3] + h, sizeof(weight));
      sum3 += value * weight;
    }
    const Lanes* sums[kExpertBlock] = {&sum0, &sum1, &sum2, &sum3};
    for (std::int64_t e = 0; e < count; ++e) {
      float total = 0.0f;
      for (std::int64_t lane = 0; lane < kLanes; ++lane) total += (*sums[e])[lane];
      for (std::int64_t h = whole; h < hidden; ++h) total += x[h] * rows[e][h];
      logits[begin + e] = total;
    }
  }
}

bool AnyNan(std::span<const float> values) {
  return std::any_of(values.begin(), values.end(), [](float v) { return std::isnan(v); });
}

// The indices of the `count` largest values, largest first, the lower index first among equals.
// REQUIRES: count <= values.size().
void TakeTop(std::span<const float> values, int count, std::int32_t* indices) {
  int taken = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float value = values[i];
    if (taken == count && !(value > values[static_cast<std::size_t>(indices[count - 1])])) continue;
    int place = taken < count ? taken++ : count - 1;
    for (; place > 0 && value > values[static_cast<std::size_t>(indices[place - 1])]; --place) {
      indices[place] = indices[place - 1];
    }
    indices[place] = static_cast<std::int32_t>(i);
  }
}

// Softmax over all experts, in place. An infinite logit gives NaN, as it does in the original.
void Softmax(std::span<float> values) {
  const float largest = *std::max_element(values.begin(), values.end());
  float sum = 0.0f;
  for (float& value : values) {
    value = std::exp(value - largest);
    sum += value;
  }
  for (float& value : values) value /= sum;
}

// Leaves the scores of the best groups in `choice`, and -inf in place of the others', as DeepSeek's
// own inference code does: a bias may make every score negative, and 0 would win over them. A group
// is worth the sum of its two best scores.
void KeepBestGroups(const RouterConfig& config, std::span<float> choice,
                    std::span<float> group_scores, std::int32_t* best_groups) {
  const std::size_t group_size = choice.size() / group_scores.size();
  for (std::size_t g = 0; g < group_scores.size(); ++g) {
    float first = -std::numeric_limits<float>::infinity();
    float second = first;
    for (const float score : choice.subspan(g * group_size, group_size)) {
      if (score > first) {
        second = first;
        first = score;
      } else if (score > second) {
        second = score;
      }
    }
    group_scores[g] = first + second;
  }
  TakeTop(group_scores, config.topk_groups, best_groups);
  for (std::size_t g = 0; g < group_scores.size(); ++g) {
    const bool kept = std::find(best_groups, best_groups + config.topk_groups,
                                static_cast<std::int32_t>(g)) != best_groups + config.topk_groups;
    if (kept) continue;
    const auto group = choice.subspan(g * group_size, group_size);
    std::fill(group.begin(), group.end(), -std::numeric_limits<float>::infinity());
  }
}

constexpr int kMaxGroups = 256;

void PoisonRow(int topk, std::int32_t* ids, float* weights) {
  for (int k = 0; k < topk; ++k) {
    ids[k] = k;
    weights[k] = std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace

absl::Status ValidateRouterConfig(const RouterConfig& config) {
  if (config.hidden < 1 || config.num_experts < 1) {
    return absl::InvalidArgumentError(absl::StrCat("router: hidden ", config.hidden,
                                                   " and experts ", config.num_experts,
                                                   " must be at least 1"));
  }
  if (config.topk < 1 || config.topk > config.num_experts) {
    return absl::InvalidArgumentError(
        absl::StrCat("router: topk ", config.topk, " is outside [1, ", config.num_experts, "]"));
  }
  if (config.kind == RouterKind::kSoftmax) return absl::OkStatus();
  if (config.num_groups < 1 || config.num_groups > kMaxGroups ||
      config.num_experts % config.num_groups != 0 || config.num_experts / config.num_groups < 2) {
    return absl::InvalidArgumentError(absl::StrCat("router: n_group ", config.num_groups,
                                                   " does not split ", config.num_experts,
                                                   " experts into equal groups of at least 2"));
  }
  if (config.topk_groups < 1 || config.topk_groups > config.num_groups) {
    return absl::InvalidArgumentError(absl::StrCat("router: topk_group ", config.topk_groups,
                                                   " is outside [1, ", config.num_groups, "]"));
  }
  const std::int64_t choosable = config.topk_groups * (config.num_experts / config.num_groups);
  if (config.topk > choosable) {
    return absl::InvalidArgumentError(absl::StrCat("router: topk ", config.topk, " exceeds the ",
                                                   choosable, " experts of ", config.topk_groups,
                                                   " groups"));
  }
  if (!std::isfinite(config.scaling_factor)) {
    return absl::InvalidArgumentError("router: routed_scaling_factor is not finite");
  }
  return absl::OkStatus();
}

std::int64_t RouterScratchFloats(const RouterConfig& config) {
  return 2 * config.num_experts + config.num_groups;
}

void RouteRows(const RouterConfig& config, const float* gate, const float* bias, const float* x,
               std::int64_t num_rows, std::span<float> scratch, std::int32_t* ids, float* weights) {
  const auto num_experts = static_cast<std::size_t>(config.num_experts);
  const std::span<float> scores = scratch.subspan(0, num_experts);
  const std::span<float> choice = scratch.subspan(num_experts, num_experts);
  const std::span<float> group_scores =
      scratch.subspan(2 * num_experts, static_cast<std::size_t>(config.num_groups));
  const bool grouped = config.kind == RouterKind::kGroupedSigmoid;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    std::int32_t* row_ids = ids + row * config.topk;
    float* row_weights = weights + row * config.topk;
    Logits(gate, x + row * config.hidden, config.num_experts, config.hidden, scores.data());
    if (AnyNan(scores)) {
      PoisonRow(config.topk, row_ids, row_weights);
      continue;
    }
    if (grouped) {
      for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
      for (std::size_t e = 0; e < num_experts; ++e) {
        choice[e] = scores[e] + (bias != nullptr ? bias[e] : 0.0f);
      }
    } else {
      Softmax(scores);
      std::copy(scores.begin(), scores.end(), choice.begin());
    }
    if (AnyNan(choice)) {
      PoisonRow(config.topk, row_ids, row_weights);
      continue;
    }
    if (grouped) {
      std::int32_t best_groups[kMaxGroups];
      KeepBestGroups(config, choice, group_scores, best_groups);
    }
    TakeTop(choice, config.topk, row_ids);
    // The original guards DeepSeek's denominator alone; a softmax's top-k sum is never 0.
    float sum = grouped ? 1e-20f : 0.0f;
    for (int k = 0; k < config.topk; ++k) {
      row_weights[k] = scores[static_cast<std::size_t>(row_ids[k])];
      sum += row_weights[k];
    }
    for (int k = 0; k < config.topk; ++k) {
      if (config.renormalise) row_weights[k] /= sum;
      if (grouped) row_weights[k] *= config.scaling_factor;
    }
  }
}

}  // namespace epserve::runtime
