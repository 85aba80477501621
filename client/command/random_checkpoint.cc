#include "client/command/random_checkpoint.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/command/undo.h"
#include "client/cpp/element_type.h"
#include "client/cpp/reference_config.h"
#include "client/cpp/safetensors_file.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::int64_t kScaleBlock = 128;
constexpr double kMaxFp8 = 448;
// Shards are filled by bytes; a name's number has five digits, as HuggingFace's.
constexpr char kIndexName[] = "model.safetensors.index.json";
constexpr char kSingleName[] = "model.safetensors";

// How a tensor's values come about.
enum class Content { kWeight, kScaleOfPrevious, kBias };

struct PlannedTensor {
  TensorSpec spec;
  Content content = Content::kWeight;
  std::uint64_t bytes() const {
    return static_cast<std::uint64_t>(*ElementCount(spec.shape)) * ElementSize(spec.type);
  }
};

// Small, fast, and the same everywhere: splitmix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  // Uniform in [-1, 1).
  double Symmetric() {
    state_ += 0x9e3779b97f4a7c15ull;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1p-52 - 1.0;
  }

 private:
  std::uint64_t state_;
};

std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Architecture ToArchitecture(const std::string& name) {
  if (name == "mixtral") return Architecture::kMixtral;
  return name == "qwen3_moe" ? Architecture::kQwen3Moe : Architecture::kDeepseekV3;
}

ElementType ToElementType(const std::string& name) {
  if (name == "fp32") return ElementType::kF32;
  if (name == "fp16") return ElementType::kF16;
  return name == "fp8" ? ElementType::kF8E4m3 : ElementType::kBf16;
}

// DeepSeek-V3 has one dense layer before those with experts here, where the real model has three.
std::int64_t FirstLayer(Architecture architecture) {
  return architecture == Architecture::kDeepseekV3 ? 1 : 0;
}

struct Groups {
  std::int64_t count = 1;
  std::int64_t chosen = 1;
};

// The largest of 8, 4, 2, 1 groups that divide E into at least two experts each; half of them are
// chosen, or as many as K experts need.
Groups ChooseGroups(std::int64_t num_experts, std::int64_t topk) {
  Groups groups;
  for (const std::int64_t count : {8, 4, 2}) {
    if (num_experts % count == 0 && num_experts / count >= 2) {
      groups.count = count;
      break;
    }
  }
  groups.chosen = std::min(
      groups.count,
      std::max<std::int64_t>({1, groups.count / 2, CeilDiv(topk, num_experts / groups.count)}));
  return groups;
}

Json CommonConfig(const MakeCheckpointOptions& options, const char* class_name,
                  std::int64_t num_layers) {
  const std::int64_t heads = std::max<std::int64_t>(1, options.hidden / 64);
  return Json{{"architectures", {class_name}},
              {"model_type", options.architecture},
              {"hidden_size", options.hidden},
              {"num_hidden_layers", num_layers},
              {"num_experts_per_tok", options.topk},
              {"num_attention_heads", heads},
              {"num_key_value_heads", heads},
              {"hidden_act", "silu"},
              {"vocab_size", 32000},
              {"max_position_embeddings", 4096},
              {"rms_norm_eps", 1e-6},
              {"rope_theta", 1000000.0},
              {"initializer_range", 0.02},
              {"attention_dropout", 0.0},
              {"tie_word_embeddings", false},
              {"use_cache", true},
              {"bos_token_id", 1},
              {"eos_token_id", 2},
              {"torch_dtype", options.dtype == "fp32"   ? "float32"
                              : options.dtype == "fp16" ? "float16"
                                                        : "bfloat16"}};
}

Json MixtralConfig(const MakeCheckpointOptions& options) {
  Json config = CommonConfig(options, "MixtralForCausalLM", options.num_layers);
  config.update(Json{{"intermediate_size", options.intermediate},
                     {"num_local_experts", options.num_experts},
                     {"output_router_logits", false},
                     {"router_aux_loss_coef", 0.02},
                     {"router_jitter_noise", 0.0},
                     {"sliding_window", nullptr}});
  return config;
}

Json QwenConfig(const MakeCheckpointOptions& options) {
  Json config = CommonConfig(options, "Qwen3MoeForCausalLM", options.num_layers);
  config.update(Json{{"intermediate_size", 3 * options.intermediate},
                     {"moe_intermediate_size", options.intermediate},
                     {"num_experts", options.num_experts},
                     {"norm_topk_prob", true},
                     {"decoder_sparse_step", 1},
                     {"mlp_only_layers", Json::array()},
                     {"head_dim", 64},
                     {"attention_bias", false},
                     {"output_router_logits", false},
                     {"router_aux_loss_coef", 0.001},
                     {"sliding_window", nullptr},
                     {"use_sliding_window", false}});
  return config;
}

Json DeepseekConfig(const MakeCheckpointOptions& options) {
  const std::int64_t first = FirstLayer(Architecture::kDeepseekV3);
  const Groups groups = ChooseGroups(options.num_experts, options.topk);
  Json config = CommonConfig(options, "DeepseekV3ForCausalLM", first + options.num_layers);
  config.update(Json{{"intermediate_size", 9 * options.intermediate},
                     {"moe_intermediate_size", options.intermediate},
                     {"n_routed_experts", options.num_experts},
                     {"n_shared_experts", 1},
                     {"first_k_dense_replace", first},
                     {"moe_layer_freq", 1},
                     {"n_group", groups.count},
                     {"topk_group", groups.chosen},
                     {"topk_method", "noaux_tc"},
                     {"scoring_func", "sigmoid"},
                     {"norm_topk_prob", true},
                     {"routed_scaling_factor", 2.5},
                     {"aux_loss_alpha", 0.001},
                     {"seq_aux", true},
                     {"ep_size", 1},
                     {"num_nextn_predict_layers", 0},
                     {"q_lora_rank", 1536},
                     {"kv_lora_rank", 512},
                     {"qk_nope_head_dim", 128},
                     {"qk_rope_head_dim", 64},
                     {"v_head_dim", 128},
                     {"attention_bias", false}});
  if (options.dtype == "fp8") {
    config["quantization_config"] = {{"quant_method", "fp8"},
                                     {"fmt", "e4m3"},
                                     {"activation_scheme", "dynamic"},
                                     {"weight_block_size", {kScaleBlock, kScaleBlock}}};
  }
  return config;
}

void PlanWeight(const std::string& name, ElementType type, std::int64_t rows, std::int64_t columns,
                std::vector<PlannedTensor>& plan) {
  plan.push_back({{name, type, {rows, columns}}, Content::kWeight});
  if (type == ElementType::kF8E4m3) {
    plan.push_back({{name + "_scale_inv",
                     ElementType::kF32,
                     {CeilDiv(rows, kScaleBlock), CeilDiv(columns, kScaleBlock)}},
                    Content::kScaleOfPrevious});
  }
}

std::vector<PlannedTensor> Plan(const MakeCheckpointOptions& options) {
  const Architecture architecture = ToArchitecture(options.architecture);
  const ElementType type = ToElementType(options.dtype);
  // DeepSeek keeps its routers out of FP8.
  const ElementType router_type = type == ElementType::kF8E4m3 ? ElementType::kBf16 : type;
  std::vector<PlannedTensor> plan;
  const std::int64_t first = FirstLayer(architecture);
  for (std::int64_t layer = first; layer < first + options.num_layers; ++layer) {
    if (options.router) {
      PlanWeight(RouterName(architecture, layer), router_type, options.num_experts, options.hidden,
                 plan);
      if (architecture == Architecture::kDeepseekV3) {
        plan.push_back(
            {{RouterBiasName(layer), ElementType::kF32, {options.num_experts}}, Content::kBias});
      }
    }
    for (std::int64_t expert = 0; expert < options.num_experts; ++expert) {
      const auto name = [&](Projection p) { return ExpertName(architecture, layer, expert, p); };
      PlanWeight(name(Projection::kGate), type, options.intermediate, options.hidden, plan);
      PlanWeight(name(Projection::kUp), type, options.intermediate, options.hidden, plan);
      PlanWeight(name(Projection::kDown), type, options.hidden, options.intermediate, plan);
    }
    if (architecture == Architecture::kDeepseekV3) {
      const std::string shared = absl::StrCat("model.layers.", layer, ".mlp.shared_experts.");
      PlanWeight(shared + "gate_proj.weight", type, options.intermediate, options.hidden, plan);
      PlanWeight(shared + "up_proj.weight", type, options.intermediate, options.hidden, plan);
      PlanWeight(shared + "down_proj.weight", type, options.hidden, options.intermediate, plan);
    }
  }
  return plan;
}

// Makes one tensor's bytes after another; remembers the scales of the FP8 matrix before.
class TensorMaker {
 public:
  explicit TensorMaker(std::uint64_t seed) : random_(seed) {}

  TensorBytes Make(const PlannedTensor& planned) {
    if (planned.content == Content::kScaleOfPrevious) {
      return MakeTensor(ElementType::kF32, planned.spec.shape, scales_).bytes;
    }
    const auto& shape = planned.spec.shape;
    const auto count = static_cast<std::size_t>(*ElementCount(shape));
    // sqrt(3 / n) uniform has variance 1 / n. The bias is small beside sigmoid scores of about 0.5.
    const double bound = planned.content == Content::kBias
                             ? 0.05
                             : std::sqrt(3.0 / static_cast<double>(shape.back()));
    values_.resize(count);
    for (double& value : values_) value = bound * random_.Symmetric();
    if (planned.spec.type == ElementType::kF8E4m3) ScaleBlocks(shape[0], shape[1]);
    return MakeTensor(planned.spec.type, shape, values_).bytes;
  }

 private:
  // Divides each 128x128 block by its scale, which takes the block's largest value to 448.
  void ScaleBlocks(std::int64_t rows, std::int64_t columns) {
    const std::int64_t blocks_across = CeilDiv(columns, kScaleBlock);
    scales_.assign(static_cast<std::size_t>(CeilDiv(rows, kScaleBlock) * blocks_across), 0.0);
    const auto scale_of = [&](std::int64_t r, std::int64_t c) -> double& {
      return scales_[(r / kScaleBlock) * blocks_across + c / kScaleBlock];
    };
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        double& scale = scale_of(r, c);
        scale = std::max(scale, std::fabs(values_[r * columns + c]) / kMaxFp8);
      }
    }
    for (double& scale : scales_) scale = static_cast<float>(scale);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) values_[r * columns + c] /= scale_of(r, c);
    }
  }

  Random random_;
  std::vector<double> values_;
  std::vector<double> scales_;
};

absl::Status WriteText(const std::string& path, const std::string& text, Undo& undo) {
  Undo::Step step(&undo);
  step.Made(path);
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text << "\n";
  if (file.flush()) return absl::OkStatus();
  const int error = errno;
  const std::string message =
      absl::StrCat("make-checkpoint: write '", path, "': ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    return absl::ResourceExhaustedError(message + "; make room, or write elsewhere");
  }
  return absl::UnknownError(message);
}

// Creates `path` and the directories above it that are missing, and takes note of them.
absl::Status CreateDirectories(const fs::path& path, Undo& undo) {
  std::vector<fs::path> missing;
  std::error_code error;
  for (fs::path at = path; !at.empty() && !fs::exists(at, error); at = at.parent_path()) {
    if (at.has_filename()) missing.push_back(at);
    if (at == at.parent_path()) break;
  }
  for (auto at = missing.rbegin(); at != missing.rend(); ++at) {
    Undo::Step step(&undo);
    if (fs::create_directory(*at, error)) step.Made(*at);
    if (error) break;
  }
  if (!error && !fs::is_directory(path, error) && !error) {
    error = std::make_error_code(std::errc::not_a_directory);
  }
  if (!error) return absl::OkStatus();
  const std::string message =
      absl::StrCat("make-checkpoint: --output '", path.string(), "': ", error.message());
  return error == std::errc::no_space_on_device ? absl::ResourceExhaustedError(message)
                                                : absl::InvalidArgumentError(message);
}

absl::Status CheckOptions(const MakeCheckpointOptions& options) {
  if (options.topk > options.num_experts) {
    return absl::InvalidArgumentError(absl::StrCat("make-checkpoint: --topk ", options.topk,
                                                   " exceeds --experts ", options.num_experts));
  }
  if (options.architecture == "deepseek_v3" && options.num_experts < 2) {
    return absl::InvalidArgumentError(
        "make-checkpoint: --experts 1 is too few for deepseek_v3, which scores a group by the two "
        "best in it; give at least 2");
  }
  if (options.dtype == "fp8" && options.architecture != "deepseek_v3") {
    return absl::InvalidArgumentError(absl::StrCat("make-checkpoint: --dtype fp8 is not a type of ",
                                                   options.architecture,
                                                   "; give --architecture deepseek_v3"));
  }
  return absl::OkStatus();
}

// An empty directory at `path`, as far as checkpoints go: with `force`, an older one is removed.
absl::Status PrepareDirectory(const std::string& path, bool force, Undo& undo) {
  EPC_RETURN_IF_ERROR(CreateDirectories(path, undo));
  std::error_code error;
  const bool empty = fs::is_empty(path, error);
  if (!error && empty) return absl::OkStatus();
  if (!force) {
    return absl::FailedPreconditionError(absl::StrCat("make-checkpoint: --output '", path,
                                                      "' is not empty; give another directory, or "
                                                      "--force to replace the checkpoint in it"));
  }
  std::vector<fs::path> old;
  for (const auto& entry : fs::directory_iterator(path, error)) {
    const std::string name = entry.path().filename().string();
    const bool shard = absl::StartsWith(name, "model-") && absl::EndsWith(name, ".safetensors");
    // What a run left that could not undo it.
    const bool partial =
        absl::StartsWith(name, "model") && absl::StrContains(name, ".safetensors.partial-");
    if (shard || partial || name == kSingleName || name == kIndexName || name == "config.json") {
      old.push_back(entry.path());
    }
  }
  for (const fs::path& file : old) {
    if (!error) fs::remove(file, error);
  }
  if (error) {
    return absl::UnknownError(
        absl::StrCat("make-checkpoint: clear '", path, "': ", error.message()));
  }
  return absl::OkStatus();
}

// Cuts the plan into `num_shards` runs of about the same bytes, none empty.
std::vector<std::vector<PlannedTensor>> Cut(const std::vector<PlannedTensor>& plan,
                                            std::int64_t num_shards, std::uint64_t total_bytes) {
  std::vector<std::vector<PlannedTensor>> shards(1);
  std::uint64_t done = 0;
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const auto filled = static_cast<std::int64_t>(shards.size());
    const std::size_t left = plan.size() - i;
    const bool full = done >= total_bytes / static_cast<std::uint64_t>(num_shards) *
                                  static_cast<std::uint64_t>(filled);
    // A shard is also ended early where the tensors left only just fill the shards left.
    const bool scarce = left <= static_cast<std::size_t>(num_shards - filled);
    if (!shards.back().empty() && filled < num_shards && (full || scarce)) shards.emplace_back();
    shards.back().push_back(plan[i]);
    done += plan[i].bytes();
  }
  return shards;
}

}  // namespace

absl::StatusOr<CheckpointSummary> WriteRandomCheckpoint(
    const MakeCheckpointOptions& options,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress, Interruption* interruption) {
  EPC_RETURN_IF_ERROR(CheckOptions(options));
  const std::vector<PlannedTensor> plan = Plan(options);
  CheckpointSummary summary;
  summary.num_tensors = static_cast<std::int64_t>(plan.size());
  summary.num_files = options.num_shards;
  for (const PlannedTensor& planned : plan) summary.bytes += planned.bytes();
  if (options.num_shards > summary.num_tensors) {
    return absl::InvalidArgumentError(absl::StrCat("make-checkpoint: --shards ", options.num_shards,
                                                   " exceeds the ", summary.num_tensors,
                                                   " tensors"));
  }
  Undo undo(interruption);
  EPC_RETURN_IF_ERROR(PrepareDirectory(options.output_dir, options.force, undo));

  const Architecture architecture = ToArchitecture(options.architecture);
  const Json config = architecture == Architecture::kMixtral    ? MixtralConfig(options)
                      : architecture == Architecture::kQwen3Moe ? QwenConfig(options)
                                                                : DeepseekConfig(options);
  TensorMaker maker(options.seed);
  Json weight_map = Json::object();
  // As a list: operator[] would look through all of it each time.
  auto& places = weight_map.get_ref<Json::object_t&>();
  places.reserve(plan.size());
  std::uint64_t written = 0;
  const auto shards = Cut(plan, options.num_shards, summary.bytes);
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1 ? std::string(kSingleName)
                                                : absl::StrFormat("model-%05d-of-%05d.safetensors",
                                                                  i + 1, shards.size());
    std::vector<TensorSpec> specs;
    for (const PlannedTensor& planned : shards[i]) specs.push_back(planned.spec);
    const std::string path = options.output_dir + "/" + name;
    std::unique_ptr<SafetensorsWriter> writer;
    {
      Undo::Step step(&undo);
      EPC_ASSIGN_OR_RETURN(writer, SafetensorsWriter::Create(path, specs));
      step.Made(writer->written_path());
    }
    for (const PlannedTensor& planned : shards[i]) {
      EPC_RETURN_IF_ERROR(writer->Append(maker.Make(planned)));
      if (shards.size() > 1) places.emplace_back(planned.spec.name, name);
      written += planned.bytes();
      if (progress) progress(written, summary.bytes);
    }
    Undo::Step step(&undo);
    EPC_RETURN_IF_ERROR(writer->Finish());
    step.Made(path);
  }
  if (shards.size() > 1) {
    const Json index = {{"metadata", {{"total_size", summary.bytes}}}, {"weight_map", weight_map}};
    EPC_RETURN_IF_ERROR(WriteText(options.output_dir + "/" + kIndexName, index.dump(2), undo));
  }
  // Last, so that a directory with a config holds a whole checkpoint.
  EPC_RETURN_IF_ERROR(WriteText(options.output_dir + "/config.json", config.dump(2), undo));
  undo.Keep();
  return summary;
}

}  // namespace epserve::client
