// What config.json of a HuggingFace directory says about the experts: Mixtral, Qwen3-MoE and
// DeepSeek-V3. Shared experts, attention and embeddings are the caller's and are not looked at.
// Pure functions over plain values, safe from any thread.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_MODEL_CONFIG_H_
#define EPSERVE_RUNTIME_CHECKPOINT_MODEL_CONFIG_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/routing/router.h"

namespace epserve::runtime {

enum class Architecture : std::uint8_t { kMixtral, kQwen3Moe, kDeepseekV3 };

// "mixtral", "qwen3_moe", "deepseek_v3": config.json's model_type.
std::string_view ArchitectureName(Architecture architecture);

struct ModelConfig {
  Architecture architecture = Architecture::kMixtral;
  std::int64_t hidden = 0;           // H
  std::int64_t intermediate = 0;     // I, of one routed expert
  std::int64_t num_experts = 0;      // E, routed experts of a layer
  int topk = 0;                      // K
  std::vector<std::int64_t> layers;  // model layer numbers that have experts, ascending, not empty
  bool has_fp8_blocks = false;       // FP8 e4m3 weights with one scale for each 128 x 128 block
  RouterConfig router;
};

inline constexpr std::int64_t kFp8BlockSize = 128;

// Fields that decide the shapes must be there; the others default as HuggingFace's configuration
// classes do. `file` is named in errors. DATA_LOSS: not JSON. INVALID_ARGUMENT: a field is missing,
// of the wrong type, out of a sane range or says something that is not supported.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view file);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_MODEL_CONFIG_H_
