// The served model as its checkpoint gives it; the same for every rank. A plain value.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_MODEL_INFO_H_
#define EPSERVE_RUNTIME_CHECKPOINT_MODEL_INFO_H_

#include <cstdint>
#include <string>
#include <vector>

namespace epserve::runtime {

struct ModelInfo {
  // Hex. Made of the shape, the router's rules, the names, types and sizes of the expert and router
  // tensors, and a sample of their content: the first 64 bytes of every expert tensor (of 4096 at
  // even distances, where there are more) and of every router tensor. So a base model and its
  // fine-tune differ, while the same tensors in other files are the same.
  std::string fingerprint;
  std::string architecture;          // "mixtral", "qwen3_moe", "deepseek_v3"
  std::int64_t hidden = 0;           // H
  std::int64_t intermediate = 0;     // I
  std::int64_t num_experts = 0;      // E
  int topk = 0;                      // K
  std::vector<std::int64_t> layers;  // model layer numbers that have experts, ascending
  bool has_router = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_MODEL_INFO_H_
