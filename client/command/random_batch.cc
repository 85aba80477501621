#include "client/command/random_batch.h"

#include <numeric>

namespace epserve::client {

Tensor RandomBatch::HiddenStates(ElementType type, std::int64_t num_tokens) {
  // Uniform with variance 1.
  std::uniform_real_distribution<double> values(-1.7320508075688772, 1.7320508075688772);
  std::vector<double> hidden(static_cast<std::size_t>(num_tokens * hidden_));
  for (double& value : hidden) value = values(engine_);
  return MakeTensor(type, {num_tokens, hidden_}, hidden);
}

std::vector<std::int64_t> RandomBatch::Ids(std::int64_t num_tokens) {
  std::vector<std::int64_t> experts(static_cast<std::size_t>(num_experts_));
  std::iota(experts.begin(), experts.end(), 0);
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(num_tokens * topk_));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    // The first K places of a shuffle.
    for (std::int64_t k = 0; k < topk_; ++k) {
      std::uniform_int_distribution<std::int64_t> rest(k, num_experts_ - 1);
      std::swap(experts[k], experts[rest(engine_)]);
      ids.push_back(experts[k]);
    }
  }
  return ids;
}

std::vector<double> RandomBatch::Weights(std::int64_t num_tokens) {
  std::uniform_real_distribution<double> values(0.05, 1.0);
  std::vector<double> weights(static_cast<std::size_t>(num_tokens * topk_));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    double sum = 0;
    for (std::int64_t k = 0; k < topk_; ++k) sum += weights[t * topk_ + k] = values(engine_);
    for (std::int64_t k = 0; k < topk_; ++k) {
      weights[t * topk_ + k] = static_cast<float>(weights[t * topk_ + k] / sum);
    }
  }
  return weights;
}

Tensor IdTensor(ElementType type, const std::vector<std::int64_t>& ids, std::int64_t topk) {
  return MakeTensor(type, {static_cast<std::int64_t>(ids.size()) / topk, topk},
                    std::vector<double>(ids.begin(), ids.end()));
}

Tensor WeightTensor(const std::vector<double>& weights, std::int64_t topk) {
  return MakeTensor(ElementType::kF32, {static_cast<std::int64_t>(weights.size()) / topk, topk},
                    weights);
}

ElementType RowType(const std::string& dtype) {
  if (dtype == "fp32") return ElementType::kF32;
  return dtype == "fp16" ? ElementType::kF16 : ElementType::kBf16;
}

}  // namespace epserve::client
