#include "runtime/checkpoint/model_config.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// Far above any published model (DeepSeek-V3: 7168, 2048, 256 experts, 61 layers), and low enough
// that no product of them overflows 64 bits.
constexpr std::int64_t kMaxHidden = 1 << 17;
constexpr std::int64_t kMaxIntermediate = 1 << 18;
constexpr std::int64_t kMaxExperts = 1 << 12;
constexpr std::int64_t kMaxLayers = 1 << 10;

// Reads fields and names the file in what it refuses.
class ConfigReader {
 public:
  ConfigReader(const nlohmann::json& root, std::string_view file) : root_(root), file_(file) {}

  absl::Status Refuse(std::string_view message) const {
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint: ", file_, ": ", std::string(message)));
  }

  // An integer in [low, high]; absent or null gives `fallback`, or is refused without one.
  absl::StatusOr<std::int64_t> Integer(const char* name, std::int64_t low, std::int64_t high,
                                       std::optional<std::int64_t> fallback = std::nullopt) const {
    const nlohmann::json* field = Find(name);
    if (field == nullptr) {
      if (fallback.has_value()) return *fallback;
      return Refuse(absl::StrCat("field \"", name, "\" is missing"));
    }
    if (!field->is_number_integer()) {
      return Refuse(
          absl::StrCat("field \"", name, "\" is ", field->type_name(), "; expected an integer"));
    }
    const bool too_big = field->is_number_unsigned() &&
                         field->get<std::uint64_t>() >
                             static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    const std::int64_t value = too_big ? 0 : field->get<std::int64_t>();
    if (too_big || value < low || value > high) {
      return Refuse(absl::StrCat("field \"", name, "\" is ", field->dump(), ", outside [", low,
                                 ", ", high, "]"));
    }
    return value;
  }

  absl::StatusOr<double> Number(const char* name, double fallback) const {
    const nlohmann::json* field = Find(name);
    if (field == nullptr) return fallback;
    if (!field->is_number()) {
      return Refuse(
          absl::StrCat("field \"", name, "\" is ", field->type_name(), "; expected a number"));
    }
    return field->get<double>();
  }

  absl::StatusOr<bool> Bool(const char* name, bool fallback) const {
    const nlohmann::json* field = Find(name);
    if (field == nullptr) return fallback;
    if (!field->is_boolean()) {
      return Refuse(
          absl::StrCat("field \"", name, "\" is ", field->type_name(), "; expected true or false"));
    }
    return field->get<bool>();
  }

  // A string that must be `expected` where it is given.
  absl::Status Expect(const char* name, std::string_view expected) const {
    const nlohmann::json* field = Find(name);
    if (field == nullptr) return absl::OkStatus();
    if (!field->is_string() || field->get_ref<const std::string&>() != expected) {
      return Refuse(absl::StrCat("field \"", name, "\" is ", Short(*field), "; only \"",
                                 std::string(expected), "\" is supported"));
    }
    return absl::OkStatus();
  }

  // A list of layer numbers; absent or null is empty.
  absl::StatusOr<std::vector<std::int64_t>> Layers(const char* name) const {
    std::vector<std::int64_t> layers;
    const nlohmann::json* field = Find(name);
    if (field == nullptr) return layers;
    if (!field->is_array()) {
      return Refuse(
          absl::StrCat("field \"", name, "\" is ", field->type_name(), "; expected a list"));
    }
    for (const nlohmann::json& item : *field) {
      if (!item.is_number_unsigned() || item.get<std::uint64_t>() >= kMaxLayers) {
        return Refuse(absl::StrCat("field \"", name, "\" holds ", Short(item),
                                   "; expected layer numbers below ", kMaxLayers));
      }
      layers.push_back(item.get<std::int64_t>());
    }
    return layers;
  }

  const nlohmann::json* Find(const char* name) const {
    const auto found = root_.find(name);
    return found == root_.end() || found->is_null() ? nullptr : &*found;
  }

  static std::string Short(const nlohmann::json& value) {
    std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
    if (text.size() > 64) text = text.substr(0, 61) + "...";
    return text;
  }

 private:
  const nlohmann::json& root_;
  const std::string file_;
};

absl::Status ReadMixtral(const ConfigReader& reader, ModelConfig* config) {
  EPS_ASSIGN_OR_RETURN(config->intermediate,
                       reader.Integer("intermediate_size", 1, kMaxIntermediate));
  EPS_ASSIGN_OR_RETURN(config->num_experts, reader.Integer("num_local_experts", 1, kMaxExperts));
  EPS_ASSIGN_OR_RETURN(const std::int64_t num_layers,
                       reader.Integer("num_hidden_layers", 1, kMaxLayers));
  for (std::int64_t layer = 0; layer < num_layers; ++layer) config->layers.push_back(layer);
  config->router.renormalise = true;
  return absl::OkStatus();
}

absl::Status ReadQwen3Moe(const ConfigReader& reader, ModelConfig* config) {
  EPS_ASSIGN_OR_RETURN(config->intermediate,
                       reader.Integer("moe_intermediate_size", 1, kMaxIntermediate));
  EPS_ASSIGN_OR_RETURN(config->num_experts, reader.Integer("num_experts", 1, kMaxExperts));
  EPS_ASSIGN_OR_RETURN(const std::int64_t num_layers,
                       reader.Integer("num_hidden_layers", 1, kMaxLayers));
  EPS_ASSIGN_OR_RETURN(const std::int64_t step,
                       reader.Integer("decoder_sparse_step", 1, kMaxLayers, 1));
  EPS_ASSIGN_OR_RETURN(const std::vector<std::int64_t> dense, reader.Layers("mlp_only_layers"));
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    const bool is_dense = std::find(dense.begin(), dense.end(), layer) != dense.end();
    if (!is_dense && (layer + 1) % step == 0) config->layers.push_back(layer);
  }
  EPS_ASSIGN_OR_RETURN(config->router.renormalise, reader.Bool("norm_topk_prob", false));
  return absl::OkStatus();
}

absl::Status ReadDeepseekV3(const ConfigReader& reader, ModelConfig* config) {
  EPS_ASSIGN_OR_RETURN(config->intermediate,
                       reader.Integer("moe_intermediate_size", 1, kMaxIntermediate));
  EPS_ASSIGN_OR_RETURN(config->num_experts, reader.Integer("n_routed_experts", 1, kMaxExperts));
  EPS_ASSIGN_OR_RETURN(const std::int64_t num_layers,
                       reader.Integer("num_hidden_layers", 1, kMaxLayers));
  EPS_ASSIGN_OR_RETURN(const std::int64_t num_dense,
                       reader.Integer("first_k_dense_replace", 0, kMaxLayers));
  EPS_ASSIGN_OR_RETURN(const std::int64_t frequency,
                       reader.Integer("moe_layer_freq", 1, kMaxLayers, 1));
  for (std::int64_t layer = num_dense; layer < num_layers; ++layer) {
    if (layer % frequency == 0) config->layers.push_back(layer);
  }
  EPS_RETURN_IF_ERROR(reader.Expect("scoring_func", "sigmoid"));
  EPS_RETURN_IF_ERROR(reader.Expect("topk_method", "noaux_tc"));
  RouterConfig& router = config->router;
  router.kind = RouterKind::kGroupedSigmoid;
  EPS_ASSIGN_OR_RETURN(const std::int64_t num_groups, reader.Integer("n_group", 1, kMaxExperts, 8));
  EPS_ASSIGN_OR_RETURN(const std::int64_t topk_groups,
                       reader.Integer("topk_group", 1, kMaxExperts, 4));
  router.num_groups = static_cast<int>(num_groups);
  router.topk_groups = static_cast<int>(topk_groups);
  EPS_ASSIGN_OR_RETURN(router.renormalise, reader.Bool("norm_topk_prob", true));
  EPS_ASSIGN_OR_RETURN(const double scaling, reader.Number("routed_scaling_factor", 2.5));
  router.scaling_factor = static_cast<float>(scaling);
  return absl::OkStatus();
}

// FP8 as DeepSeek-V3 ships it is the one quantisation that is read.
absl::StatusOr<bool> ReadQuantisation(const ConfigReader& reader, std::string_view file) {
  const nlohmann::json* field = reader.Find("quantization_config");
  if (field == nullptr) return false;
  if (!field->is_object()) {
    return reader.Refuse(absl::StrCat("field \"quantization_config\" is ", field->type_name(),
                                      "; expected an object"));
  }
  const ConfigReader quantisation(*field, absl::StrCat(std::string(file), ": quantization_config"));
  if (quantisation.Find("quant_method") == nullptr) {
    return quantisation.Refuse("field \"quant_method\" is missing");
  }
  EPS_RETURN_IF_ERROR(quantisation.Expect("quant_method", "fp8"));
  EPS_RETURN_IF_ERROR(quantisation.Expect("fmt", "e4m3"));
  const nlohmann::json* block = quantisation.Find("weight_block_size");
  if (block == nullptr || *block != nlohmann::json::array({kFp8BlockSize, kFp8BlockSize})) {
    return quantisation.Refuse(
        absl::StrCat("field \"weight_block_size\" is ",
                     block == nullptr ? "missing" : ConfigReader::Short(*block),
                     "; only [128, 128] is supported"));
  }
  return true;
}

}  // namespace

std::string_view ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kMixtral:
      return "mixtral";
    case Architecture::kQwen3Moe:
      return "qwen3_moe";
    case Architecture::kDeepseekV3:
      return "deepseek_v3";
  }
  return "unknown";
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view file) {
  const nlohmann::json root =
      nlohmann::json::parse(json.begin(), json.end(), nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) {
    return absl::DataLossError(
        absl::StrCat("checkpoint: ", std::string(file), ": is not valid JSON"));
  }
  const ConfigReader reader(root, file);
  if (!root.is_object()) {
    return reader.Refuse(absl::StrCat("holds ", root.type_name(), "; expected an object"));
  }
  const nlohmann::json* type = reader.Find("model_type");
  const std::string name = type != nullptr && type->is_string() ? type->get<std::string>() : "";
  ModelConfig config;
  absl::Status status;
  EPS_ASSIGN_OR_RETURN(config.hidden, reader.Integer("hidden_size", 1, kMaxHidden));
  if (name == "mixtral") {
    config.architecture = Architecture::kMixtral;
    status = ReadMixtral(reader, &config);
  } else if (name == "qwen3_moe") {
    config.architecture = Architecture::kQwen3Moe;
    status = ReadQwen3Moe(reader, &config);
  } else if (name == "deepseek_v3") {
    config.architecture = Architecture::kDeepseekV3;
    status = ReadDeepseekV3(reader, &config);
  } else {
    return reader.Refuse(
        absl::StrCat("field \"model_type\" is ", type == nullptr ? "missing" : reader.Short(*type),
                     "; supported are \"mixtral\", \"qwen3_moe\" and \"deepseek_v3\""));
  }
  EPS_RETURN_IF_ERROR(status);
  EPS_RETURN_IF_ERROR(reader.Expect("hidden_act", "silu"));
  EPS_ASSIGN_OR_RETURN(const std::int64_t topk, reader.Integer("num_experts_per_tok", 1, kMaxTopk));
  EPS_ASSIGN_OR_RETURN(config.has_fp8_blocks, ReadQuantisation(reader, file));
  if (config.layers.empty()) return reader.Refuse("no layer has experts");
  config.topk = static_cast<int>(topk);
  config.router.hidden = config.hidden;
  config.router.num_experts = config.num_experts;
  config.router.topk = config.topk;
  if (const absl::Status valid = ValidateRouterConfig(config.router); !valid.ok()) {
    return reader.Refuse(std::string(valid.message()));
  }
  return config;
}

}  // namespace epserve::runtime
