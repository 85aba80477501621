// What the reference needs of a checkpoint's config.json, read afresh from HuggingFace's field
// names for Mixtral, Qwen3-MoE and DeepSeek-V3.
#ifndef EPSERVE_CLIENT_CPP_REFERENCE_CONFIG_H_
#define EPSERVE_CLIENT_CPP_REFERENCE_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace epserve::client {

enum class Architecture { kMixtral, kQwen3Moe, kDeepseekV3 };

// "mixtral", "qwen3_moe", "deepseek_v3": also the config's model_type.
const char* ArchitectureName(Architecture architecture);

struct ReferenceConfig {
  Architecture architecture = Architecture::kMixtral;
  std::int64_t hidden = 0;           // H
  std::int64_t intermediate = 0;     // I, of one routed expert
  std::int64_t num_experts = 0;      // E
  std::int64_t topk = 0;             // K
  std::vector<std::int64_t> layers;  // those with experts, ascending

  // Router.
  bool normalise_topk = true;        // weights divided by their sum
  double routed_scaling_factor = 1;  // DeepSeek-V3
  std::int64_t num_groups = 1;       // DeepSeek-V3
  std::int64_t topk_groups = 1;      // DeepSeek-V3
};

// INVALID_ARGUMENT: an architecture that is not one of the three. DATA_LOSS: fields are missing or
// do not fit together.
absl::StatusOr<ReferenceConfig> ParseReferenceConfig(const std::string& config_json);

// Tensor names.
std::string RouterName(Architecture architecture, std::int64_t layer);
std::string RouterBiasName(std::int64_t layer);  // DeepSeek-V3 alone has one.
enum class Projection { kGate, kUp, kDown };
std::string ExpertName(Architecture architecture, std::int64_t layer, std::int64_t expert,
                       Projection projection);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_REFERENCE_CONFIG_H_
