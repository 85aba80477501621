#include "client/cpp/reference_config.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

// Reads typed fields and remembers the first that was wrong.
class Fields {
 public:
  explicit Fields(const nlohmann::json& root) : root_(root) {}

  std::int64_t Integer(const char* name, std::int64_t minimum,
                       std::optional<std::int64_t> otherwise = {}) {
    const auto found = root_.find(name);
    if (found == root_.end() || found->is_null()) {
      if (!otherwise) Wrong(name, "is missing");
      return otherwise.value_or(minimum);
    }
    if (!found->is_number_integer() || found->get<std::int64_t>() < minimum) {
      Wrong(name, absl::StrCat("is ", found->dump(), ", not an integer from ", minimum));
      return minimum;
    }
    return found->get<std::int64_t>();
  }

  bool Bool(const char* name, bool otherwise) {
    const auto found = root_.find(name);
    if (found == root_.end() || found->is_null()) return otherwise;
    if (!found->is_boolean()) Wrong(name, absl::StrCat("is ", found->dump(), ", not a boolean"));
    return found->is_boolean() ? found->get<bool>() : otherwise;
  }

  double Number(const char* name, double otherwise) {
    const auto found = root_.find(name);
    if (found == root_.end() || found->is_null()) return otherwise;
    if (!found->is_number()) Wrong(name, absl::StrCat("is ", found->dump(), ", not a number"));
    return found->is_number() ? found->get<double>() : otherwise;
  }

  void Wrong(const char* name, const std::string& what) {
    if (error_.empty()) error_ = absl::StrCat("checkpoint: config.json: ", name, " ", what);
  }

  const std::string& error() const { return error_; }

 private:
  const nlohmann::json& root_;
  std::string error_;
};

std::optional<Architecture> ArchitectureOf(const std::string& model_type) {
  for (const Architecture candidate :
       {Architecture::kMixtral, Architecture::kQwen3Moe, Architecture::kDeepseekV3}) {
    if (model_type == ArchitectureName(candidate)) return candidate;
  }
  return std::nullopt;
}

void ReadMixtral(Fields& fields, std::int64_t num_layers, ReferenceConfig& config) {
  config.num_experts = fields.Integer("num_local_experts", 1);
  config.intermediate = fields.Integer("intermediate_size", 1);
  for (std::int64_t layer = 0; layer < num_layers; ++layer) config.layers.push_back(layer);
}

void ReadQwen3(const nlohmann::json& root, Fields& fields, std::int64_t num_layers,
               ReferenceConfig& config) {
  config.num_experts = fields.Integer("num_experts", 1);
  config.intermediate = fields.Integer("moe_intermediate_size", 1);
  config.normalise_topk = fields.Bool("norm_topk_prob", false);
  const std::int64_t step = fields.Integer("decoder_sparse_step", 1, 1);
  const auto dense = root.find("mlp_only_layers");
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    const bool is_dense = dense != root.end() && dense->is_array() &&
                          std::find(dense->begin(), dense->end(), layer) != dense->end();
    if (!is_dense && (layer + 1) % step == 0) config.layers.push_back(layer);
  }
}

void ReadDeepseek(Fields& fields, std::int64_t num_layers, ReferenceConfig& config) {
  config.num_experts = fields.Integer("n_routed_experts", 1);
  config.intermediate = fields.Integer("moe_intermediate_size", 1);
  config.normalise_topk = fields.Bool("norm_topk_prob", true);
  config.routed_scaling_factor = fields.Number("routed_scaling_factor", 1.0);
  config.num_groups = fields.Integer("n_group", 1, 1);
  config.topk_groups = fields.Integer("topk_group", 1, 1);
  const std::int64_t first = fields.Integer("first_k_dense_replace", 0, 0);
  const std::int64_t frequency = fields.Integer("moe_layer_freq", 1, 1);
  for (std::int64_t layer = first; layer < num_layers; ++layer) {
    if (layer % frequency == 0) config.layers.push_back(layer);
  }
  if (config.num_experts % config.num_groups != 0 || config.topk_groups > config.num_groups) {
    fields.Wrong("n_group",
                 absl::StrCat("is ", config.num_groups, " with topk_group ", config.topk_groups,
                              ", which does not divide ", config.num_experts, " experts"));
  }
}

}  // namespace

const char* ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kMixtral:
      return "mixtral";
    case Architecture::kQwen3Moe:
      return "qwen3_moe";
    case Architecture::kDeepseekV3:
      return "deepseek_v3";
  }
  return "";
}

absl::StatusOr<ReferenceConfig> ParseReferenceConfig(const std::string& config_json) {
  const nlohmann::json root =
      nlohmann::json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) {
    return absl::DataLossError("checkpoint: config.json is not a JSON object");
  }
  const auto type = root.find("model_type");
  const auto architecture = type != root.end() && type->is_string()
                                ? ArchitectureOf(type->get<std::string>())
                                : std::nullopt;
  if (!architecture) {
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint: config.json: model_type ",
                     type == root.end() ? std::string("is missing") : type->dump(),
                     " is not one of mixtral, qwen3_moe, deepseek_v3"));
  }
  Fields fields(root);
  ReferenceConfig config;
  config.architecture = *architecture;
  config.hidden = fields.Integer("hidden_size", 1);
  config.topk = fields.Integer("num_experts_per_tok", 1);
  // A bound on the layers keeps a damaged number from filling memory.
  const std::int64_t num_layers =
      std::min<std::int64_t>(fields.Integer("num_hidden_layers", 1), 100'000);
  switch (*architecture) {
    case Architecture::kMixtral:
      ReadMixtral(fields, num_layers, config);
      break;
    case Architecture::kQwen3Moe:
      ReadQwen3(root, fields, num_layers, config);
      break;
    case Architecture::kDeepseekV3:
      ReadDeepseek(fields, num_layers, config);
      break;
  }
  const std::int64_t choosable =
      config.topk_groups * (config.num_experts / std::max<std::int64_t>(config.num_groups, 1));
  if (config.topk > choosable) {
    fields.Wrong("num_experts_per_tok", absl::StrCat("is ", config.topk, ", which exceeds the ",
                                                     choosable, " experts to choose from"));
  }
  if (config.layers.empty()) fields.Wrong("num_hidden_layers", "leaves no layer with experts");
  if (!fields.error().empty()) return absl::DataLossError(fields.error());
  return config;
}

std::string RouterName(Architecture architecture, std::int64_t layer) {
  return absl::StrCat("model.layers.", layer,
                      architecture == Architecture::kMixtral ? ".block_sparse_moe" : ".mlp",
                      ".gate.weight");
}

std::string RouterBiasName(std::int64_t layer) {
  return absl::StrCat("model.layers.", layer, ".mlp.gate.e_score_correction_bias");
}

std::string ExpertName(Architecture architecture, std::int64_t layer, std::int64_t expert,
                       Projection projection) {
  const bool mixtral = architecture == Architecture::kMixtral;
  const char* name = "";
  switch (projection) {
    case Projection::kGate:
      name = mixtral ? "w1" : "gate_proj";
      break;
    case Projection::kUp:
      name = mixtral ? "w3" : "up_proj";
      break;
    case Projection::kDown:
      name = mixtral ? "w2" : "down_proj";
      break;
  }
  return absl::StrCat("model.layers.", layer, mixtral ? ".block_sparse_moe" : ".mlp", ".experts.",
                      expert, ".", name, ".weight");
}

}  // namespace epserve::client
