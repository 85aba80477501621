// Random inputs for verify and bench. The same seed gives the same batches.
// Thread safety: one thread.
#ifndef EPSERVE_CLIENT_COMMAND_RANDOM_BATCH_H_
#define EPSERVE_CLIENT_COMMAND_RANDOM_BATCH_H_

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "client/cpp/tensor.h"

namespace epserve::client {

class RandomBatch {
 public:
  RandomBatch(std::uint64_t seed, std::int64_t hidden, std::int64_t num_experts, std::int64_t topk)
      : engine_(seed), hidden_(hidden), num_experts_(num_experts), topk_(topk) {}

  // [T, H] of unit variance.
  Tensor HiddenStates(ElementType type, std::int64_t num_tokens);
  // [T, K], distinct within a row.
  std::vector<std::int64_t> Ids(std::int64_t num_tokens);
  // [T, K] positive, each row's sum 1, exactly representable in fp32.
  std::vector<double> Weights(std::int64_t num_tokens);

 private:
  std::mt19937_64 engine_;
  const std::int64_t hidden_;
  const std::int64_t num_experts_;
  const std::int64_t topk_;
};

Tensor IdTensor(ElementType type, const std::vector<std::int64_t>& ids, std::int64_t topk);
Tensor WeightTensor(const std::vector<double>& weights, std::int64_t topk);

// "fp32", "bf16", "fp16". REQUIRES: one of them.
ElementType RowType(const std::string& dtype);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_RANDOM_BATCH_H_
