#include "runtime/checkpoint/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

namespace epserve::runtime {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

nlohmann::json Mixtral() {
  return {{"model_type", "mixtral"}, {"hidden_size", 4096},      {"intermediate_size", 14336},
          {"num_hidden_layers", 32}, {"num_local_experts", 8},   {"num_experts_per_tok", 2},
          {"hidden_act", "silu"},    {"torch_dtype", "bfloat16"}};
}

nlohmann::json Qwen() {
  return {{"model_type", "qwen3_moe"}, {"hidden_size", 2048},
          {"intermediate_size", 6144}, {"moe_intermediate_size", 768},
          {"num_hidden_layers", 6},    {"num_experts", 128},
          {"num_experts_per_tok", 8},  {"norm_topk_prob", true},
          {"decoder_sparse_step", 1},  {"mlp_only_layers", nlohmann::json::array()}};
}

nlohmann::json Deepseek() {
  return {{"model_type", "deepseek_v3"},
          {"hidden_size", 7168},
          {"intermediate_size", 18432},
          {"moe_intermediate_size", 2048},
          {"num_hidden_layers", 61},
          {"first_k_dense_replace", 3},
          {"moe_layer_freq", 1},
          {"n_routed_experts", 256},
          {"n_shared_experts", 1},
          {"num_experts_per_tok", 8},
          {"n_group", 8},
          {"topk_group", 4},
          {"norm_topk_prob", true},
          {"routed_scaling_factor", 2.5},
          {"scoring_func", "sigmoid"},
          {"topk_method", "noaux_tc"},
          {"num_nextn_predict_layers", 1},
          {"quantization_config",
           {{"activation_scheme", "dynamic"},
            {"fmt", "e4m3"},
            {"quant_method", "fp8"},
            {"weight_block_size", {128, 128}}}}};
}

ModelConfig Parse(const nlohmann::json& json) {
  const auto config = ParseModelConfig(json.dump(), "config.json");
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : ModelConfig{};
}

void ExpectInvalid(nlohmann::json json, const nlohmann::json& patch, const std::string& part) {
  json.update(patch);
  const auto config = ParseModelConfig(json.dump(), "config.json");
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << patch;
  EXPECT_THAT(std::string(config.status().message()), HasSubstr("config.json")) << patch;
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(part)) << patch;
}

TEST(ModelConfigTest, PublishedMixtralIsRead) {
  const ModelConfig config = Parse(Mixtral());
  EXPECT_EQ(config.architecture, Architecture::kMixtral);
  EXPECT_EQ(config.hidden, 4096);
  EXPECT_EQ(config.intermediate, 14336);
  EXPECT_EQ(config.num_experts, 8);
  EXPECT_EQ(config.topk, 2);
  EXPECT_EQ(config.layers.size(), 32u);
  EXPECT_EQ(config.router.kind, RouterKind::kSoftmax);
  EXPECT_TRUE(config.router.renormalise);
  EXPECT_FALSE(config.has_fp8_blocks);
}

TEST(ModelConfigTest, PublishedQwen3MoeIsRead) {
  const ModelConfig config = Parse(Qwen());
  EXPECT_EQ(config.intermediate, 768);
  EXPECT_EQ(config.num_experts, 128);
  EXPECT_EQ(config.layers.size(), 6u);
  EXPECT_TRUE(config.router.renormalise);
  nlohmann::json without = Qwen();
  without.erase("norm_topk_prob");
  EXPECT_FALSE(Parse(without).router.renormalise);
}

TEST(ModelConfigTest, Qwen3MoeDenseLayersAreLeftOut) {
  nlohmann::json json = Qwen();
  json["mlp_only_layers"] = {1, 5};
  EXPECT_THAT(Parse(json).layers, ElementsAre(0, 2, 3, 4));
  json["decoder_sparse_step"] = 2;
  EXPECT_THAT(Parse(json).layers, ElementsAre(3));
}

TEST(ModelConfigTest, PublishedDeepseekV3IsRead) {
  const ModelConfig config = Parse(Deepseek());
  EXPECT_EQ(config.intermediate, 2048);
  EXPECT_EQ(config.layers.size(), 58u);
  EXPECT_EQ(config.layers.front(), 3);
  EXPECT_EQ(config.layers.back(), 60);  // Layer 61 predicts further tokens and is not served.
  EXPECT_TRUE(config.has_fp8_blocks);
  EXPECT_EQ(config.router.kind, RouterKind::kGroupedSigmoid);
  EXPECT_EQ(config.router.num_groups, 8);
  EXPECT_EQ(config.router.topk_groups, 4);
  EXPECT_EQ(config.router.scaling_factor, 2.5f);
  nlohmann::json every_other = Deepseek();
  every_other["num_hidden_layers"] = 8;
  every_other["moe_layer_freq"] = 2;
  EXPECT_THAT(Parse(every_other).layers, ElementsAre(4, 6));
}

TEST(ModelConfigTest, MissingFieldIsNamed) {
  for (const auto& [json, fields] :
       {std::pair<nlohmann::json, std::vector<std::string>>{
            Mixtral(),
            {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_local_experts", "num_experts_per_tok"}},
        {Qwen(), {"moe_intermediate_size", "num_experts", "num_hidden_layers"}},
        {Deepseek(), {"n_routed_experts", "first_k_dense_replace", "moe_intermediate_size"}}}) {
    for (const std::string& field : fields) ExpectInvalid(json, {{field, nullptr}}, field);
  }
}

TEST(ModelConfigTest, WrongTypeOrUnreasonableSizeIsNamed) {
  for (const nlohmann::json& value :
       {nlohmann::json("8"), nlohmann::json(8.5), nlohmann::json(true), nlohmann::json(0),
        nlohmann::json(-8), nlohmann::json(~std::uint64_t{0}),
        nlohmann::json(std::int64_t{1} << 40), nlohmann::json::array({8})}) {
    for (const char* field : {"hidden_size", "intermediate_size", "num_hidden_layers",
                              "num_local_experts", "num_experts_per_tok"}) {
      ExpectInvalid(Mixtral(), {{field, value}}, field);
    }
  }
  ExpectInvalid(Mixtral(), {{"num_experts_per_tok", 17}}, "num_experts_per_tok");
  ExpectInvalid(Mixtral(), {{"num_experts_per_tok", 9}}, "topk 9");
  ExpectInvalid(Qwen(), {{"norm_topk_prob", 1}}, "norm_topk_prob");
  ExpectInvalid(Qwen(), {{"mlp_only_layers", {-1}}}, "mlp_only_layers");
  ExpectInvalid(Qwen(), {{"mlp_only_layers", 3}}, "mlp_only_layers");
  ExpectInvalid(Qwen(), {{"decoder_sparse_step", 7}}, "no layer has experts");
  ExpectInvalid(Deepseek(), {{"first_k_dense_replace", 61}}, "no layer has experts");
  ExpectInvalid(Deepseek(), {{"n_group", 7}}, "n_group 7");
  ExpectInvalid(Deepseek(), {{"routed_scaling_factor", "x"}}, "routed_scaling_factor");
}

TEST(ModelConfigTest, WhatIsNotSupportedIsNamed) {
  ExpectInvalid(Mixtral(), {{"model_type", "llama"}}, "llama");
  ExpectInvalid(Mixtral(), {{"hidden_act", "gelu"}}, "gelu");
  ExpectInvalid(Deepseek(), {{"scoring_func", "softmax"}}, "scoring_func");
  ExpectInvalid(Deepseek(), {{"topk_method", "greedy"}}, "topk_method");
  ExpectInvalid(Mixtral(), {{"quantization_config", {{"quant_method", "gptq"}}}}, "gptq");
  ExpectInvalid(Mixtral(), {{"quantization_config", 3}}, "quantization_config");
  ExpectInvalid(
      Deepseek(),
      {{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {64, 64}}}}},
      "weight_block_size");
}

TEST(ModelConfigTest, BadJsonIsDataLoss) {
  for (const char* text : {"", "{", "{\"a\":1,}", "x"}) {
    const auto config = ParseModelConfig(text, "config.json");
    EXPECT_EQ(config.status().code(), absl::StatusCode::kDataLoss) << text;
  }
  EXPECT_EQ(ParseModelConfig("[]", "config.json").status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace epserve::runtime
