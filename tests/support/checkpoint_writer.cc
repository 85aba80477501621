#include "tests/support/checkpoint_writer.h"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

namespace epserve::testing {
namespace {

using runtime::DataType;

constexpr std::int64_t kBlock = 128;

struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  DataType dtype;
};

std::uint64_t Mix(std::uint64_t z) {  // splitmix64
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::uint64_t KeyOf(const CheckpointSpec& spec, const std::string& name) {
  std::uint64_t hash = Mix(spec.seed);
  for (const char c : name) hash = Mix(hash ^ static_cast<unsigned char>(c));
  return hash;
}

// Uniform in [-1, 1).
float Uniform(std::uint64_t key, std::uint64_t index) {
  return static_cast<float>(Mix(key + index) >> 40) * 0x1.0p-23f - 1.0f;
}

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// What is stored at `index` before it is rounded to the tensor's type.
float StoredValue(const CheckpointSpec& spec, const Tensor& tensor, std::uint64_t key,
                  std::int64_t index) {
  const float uniform = Uniform(key, static_cast<std::uint64_t>(index));
  if (EndsWith(tensor.name, "_scale_inv")) {
    // An FP8 weight is uniform in [-448, 448]; its scale brings it back to the others' size.
    return (1.0f + 0.5f * uniform) / (448.0f * std::sqrt(static_cast<float>(spec.hidden)));
  }
  if (EndsWith(tensor.name, "e_score_correction_bias")) return 0.7f * uniform - 0.5f;
  if (tensor.dtype == DataType::kFp8E4m3) return 448.0f * uniform;
  return uniform * std::sqrt(3.0f / static_cast<float>(tensor.shape.back()));
}

std::int64_t NumElements(const Tensor& tensor) {
  std::int64_t count = 1;
  for (const std::int64_t dim : tensor.shape) count *= dim;
  return count;
}

std::vector<double> Decode(const CheckpointSpec& spec, const Tensor& tensor) {
  const std::uint64_t key = KeyOf(spec, tensor.name);
  std::vector<double> values(static_cast<std::size_t>(NumElements(tensor)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float exact = StoredValue(spec, tensor, key, static_cast<std::int64_t>(i));
    unsigned char stored[4];
    float rounded;
    runtime::ConvertFromFloat(tensor.dtype, &exact, stored, 1);
    runtime::ConvertToFloat(tensor.dtype, stored, &rounded, 1);
    values[i] = rounded;
  }
  return values;
}

std::string BlockName(const CheckpointSpec& spec, std::int64_t layer) {
  return "model.layers." + std::to_string(layer) +
         (spec.layout == "mixtral" ? ".block_sparse_moe" : ".mlp");
}

Tensor WeightTensor(const CheckpointSpec& spec, std::int64_t layer, std::int64_t expert,
                    const std::string& projection) {
  const bool down = projection == "down";
  return {TensorName(spec, layer, expert, projection),
          down ? std::vector{spec.hidden, spec.intermediate}
               : std::vector{spec.intermediate, spec.hidden},
          spec.dtype};
}

Tensor ScaleTensor(const Tensor& weight) {
  return {weight.name + "_scale_inv",
          {(weight.shape[0] + kBlock - 1) / kBlock, (weight.shape[1] + kBlock - 1) / kBlock},
          DataType::kFp32};
}

DataType WideType(const CheckpointSpec& spec) {
  return spec.dtype == DataType::kFp8E4m3 ? DataType::kBf16 : spec.dtype;
}

Tensor GateTensor(const CheckpointSpec& spec, std::int64_t layer) {
  return {GateTensorName(spec, layer), {spec.experts, spec.hidden}, WideType(spec)};
}

Tensor BiasTensor(const CheckpointSpec& spec, std::int64_t layer) {
  return {
      BlockName(spec, layer) + ".gate.e_score_correction_bias", {spec.experts}, DataType::kFp32};
}

std::vector<Tensor> AllTensors(const CheckpointSpec& spec) {
  std::vector<Tensor> tensors;
  // What belongs to the caller lies among the experts' tensors and must be passed over.
  tensors.push_back({"model.embed_tokens.weight", {3, spec.hidden}, WideType(spec)});
  for (std::int64_t l = spec.first_moe_layer; l < spec.first_moe_layer + spec.moe_layers; ++l) {
    for (std::int64_t e = 0; e < spec.experts; ++e) {
      for (const char* projection : {"gate", "up", "down"}) {
        tensors.push_back(WeightTensor(spec, l, e, projection));
        if (spec.dtype == DataType::kFp8E4m3) tensors.push_back(ScaleTensor(tensors.back()));
      }
    }
    if (!spec.router) continue;
    tensors.push_back(GateTensor(spec, l));
    if (spec.layout == "deepseek_v3") tensors.push_back(BiasTensor(spec, l));
  }
  return tensors;
}

const char* StoredName(DataType dtype) {
  switch (dtype) {
    case DataType::kFp16:
      return "F16";
    case DataType::kBf16:
      return "BF16";
    case DataType::kFp8E4m3:
      return "F8_E4M3";
    default:
      return "F32";
  }
}

void WriteTensors(const std::filesystem::path& path, const CheckpointSpec& spec,
                  const std::vector<Tensor>& tensors) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::int64_t offset = 0;
  for (const Tensor& tensor : tensors) {
    const std::int64_t bytes =
        NumElements(tensor) * static_cast<std::int64_t>(runtime::DataTypeBytes(tensor.dtype));
    header[tensor.name] = {{"dtype", StoredName(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string json = header.dump();
  json.resize((json.size() + 7) / 8 * 8, ' ');
  std::ofstream out(path, std::ios::binary);
  const std::uint64_t length = json.size();
  for (int byte = 0; byte < 8; ++byte) out.put(static_cast<char>(length >> (8 * byte)));
  out << json;
  constexpr std::int64_t kPiece = 1 << 14;
  std::vector<float> exact(kPiece);
  std::vector<char> stored(kPiece * sizeof(float));
  for (const Tensor& tensor : tensors) {
    const std::uint64_t key = KeyOf(spec, tensor.name);
    const std::int64_t count = NumElements(tensor);
    for (std::int64_t begin = 0; begin < count; begin += kPiece) {
      const std::int64_t size = std::min(kPiece, count - begin);
      for (std::int64_t i = 0; i < size; ++i) {
        exact[static_cast<std::size_t>(i)] = StoredValue(spec, tensor, key, begin + i);
      }
      runtime::ConvertFromFloat(tensor.dtype, exact.data(), stored.data(),
                                static_cast<std::size_t>(size));
      out.write(stored.data(),
                size * static_cast<std::int64_t>(runtime::DataTypeBytes(tensor.dtype)));
    }
  }
}

nlohmann::json Config(const CheckpointSpec& spec) {
  nlohmann::json config = {{"model_type", spec.layout},
                           {"hidden_size", spec.hidden},
                           {"hidden_act", "silu"},
                           {"num_experts_per_tok", spec.topk},
                           {"num_hidden_layers", spec.first_moe_layer + spec.moe_layers}};
  if (spec.layout == "mixtral") {
    config["intermediate_size"] = spec.intermediate;
    config["num_local_experts"] = spec.experts;
    return config;
  }
  config["intermediate_size"] = 7;  // Of the dense layers; not to be taken for the experts'.
  config["moe_intermediate_size"] = spec.intermediate;
  config["norm_topk_prob"] = spec.renormalise;
  if (spec.layout == "qwen3_moe") {
    config["num_experts"] = spec.experts;
    config["decoder_sparse_step"] = 1;
    config["mlp_only_layers"] = nlohmann::json::array();
    for (std::int64_t l = 0; l < spec.first_moe_layer; ++l) config["mlp_only_layers"].push_back(l);
    return config;
  }
  config["n_routed_experts"] = spec.experts;
  config["first_k_dense_replace"] = spec.first_moe_layer;
  config["moe_layer_freq"] = 1;
  config["n_group"] = spec.groups;
  config["topk_group"] = spec.topk_groups;
  config["routed_scaling_factor"] = spec.scaling;
  config["scoring_func"] = "sigmoid";
  config["topk_method"] = "noaux_tc";
  if (spec.dtype == DataType::kFp8E4m3) {
    config["quantization_config"] = {
        {"quant_method", "fp8"}, {"fmt", "e4m3"}, {"weight_block_size", {kBlock, kBlock}}};
  }
  return config;
}

}  // namespace

void WriteCheckpoint(const std::filesystem::path& directory, const CheckpointSpec& spec) {
  std::filesystem::create_directories(directory);
  WriteFileBytes(directory / "config.json", Config(spec).dump(2));
  const std::vector<Tensor> tensors = AllTensors(spec);
  if (spec.shards == 1) {
    WriteTensors(directory / "model.safetensors", spec, tensors);
    return;
  }
  std::map<std::string, std::vector<Tensor>> shards;
  nlohmann::json index = {{"metadata", {{"total_size", 1}}}};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    // Dealt in turn, so that one expert's tensors lie in several files.
    char name[64];
    std::snprintf(name, sizeof(name), "model-%05d-of-%05d.safetensors",
                  static_cast<int>(i) % spec.shards + 1, spec.shards);
    shards[name].push_back(tensors[i]);
    index["weight_map"][tensors[i].name] = name;
  }
  for (const auto& [name, part] : shards) WriteTensors(directory / name, spec, part);
  WriteFileBytes(directory / "model.safetensors.index.json", index.dump());
}

std::string TensorName(const CheckpointSpec& spec, std::int64_t layer, std::int64_t expert,
                       const std::string& projection) {
  std::string part = projection + "_proj";
  if (spec.layout == "mixtral")
    part = projection == "gate" ? "w1" : projection == "up" ? "w3" : "w2";
  return BlockName(spec, layer) + ".experts." + std::to_string(expert) + "." + part + ".weight";
}

std::string GateTensorName(const CheckpointSpec& spec, std::int64_t layer) {
  return BlockName(spec, layer) + ".gate.weight";
}

std::vector<double> ReferenceWeight(const CheckpointSpec& spec, std::int64_t layer,
                                    std::int64_t expert, const std::string& projection) {
  const Tensor tensor = WeightTensor(spec, layer, expert, projection);
  std::vector<double> values = Decode(spec, tensor);
  if (spec.dtype != DataType::kFp8E4m3) return values;
  const Tensor scale = ScaleTensor(tensor);
  const std::vector<double> scales = Decode(spec, scale);
  for (std::int64_t r = 0; r < tensor.shape[0]; ++r) {
    for (std::int64_t c = 0; c < tensor.shape[1]; ++c) {
      values[static_cast<std::size_t>(r * tensor.shape[1] + c)] *=
          scales[static_cast<std::size_t>(r / kBlock * scale.shape[1] + c / kBlock)];
    }
  }
  return values;
}

std::vector<double> ReferenceGate(const CheckpointSpec& spec, std::int64_t layer) {
  return Decode(spec, GateTensor(spec, layer));
}

std::vector<double> ReferenceBias(const CheckpointSpec& spec, std::int64_t layer) {
  return Decode(spec, BiasTensor(spec, layer));
}

std::vector<double> ReferenceExpertOutput(const CheckpointSpec& spec, std::int64_t layer,
                                          std::int64_t expert, const std::vector<double>& x) {
  const auto hidden = static_cast<std::size_t>(spec.hidden);
  const auto intermediate = static_cast<std::size_t>(spec.intermediate);
  const std::vector<double> gate = ReferenceWeight(spec, layer, expert, "gate");
  const std::vector<double> up = ReferenceWeight(spec, layer, expert, "up");
  const std::vector<double> down = ReferenceWeight(spec, layer, expert, "down");
  std::vector<double> middle(intermediate);
  for (std::size_t i = 0; i < intermediate; ++i) {
    double g = 0.0, u = 0.0;
    for (std::size_t h = 0; h < hidden; ++h) {
      g += gate[i * hidden + h] * x[h];
      u += up[i * hidden + h] * x[h];
    }
    middle[i] = g / (1.0 + std::exp(-g)) * u;
  }
  std::vector<double> out(hidden);
  for (std::size_t h = 0; h < hidden; ++h) {
    for (std::size_t i = 0; i < intermediate; ++i) out[h] += down[h * intermediate + i] * middle[i];
  }
  return out;
}

TempDirectory::TempDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "epserve-test-XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) std::abort();
  path_ = std::filesystem::canonical(pattern);
}

TempDirectory::~TempDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string ReadFileBytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream bytes;
  bytes << in.rdbuf();
  return bytes.str();
}

void WriteFileBytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

}  // namespace epserve::testing
