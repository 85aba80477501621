#include "client/cpp/reference_model.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kMixtralConfig[] =
    R"({"model_type":"mixtral","hidden_size":2,"intermediate_size":1,"num_hidden_layers":1,)"
    R"("num_local_experts":2,"num_experts_per_tok":1})";

double Silu(double x) { return x / (1 + std::exp(-x)); }

// Two experts of H 2 and I 1 with plain numbers.
std::map<std::string, Tensor> MixtralTensors(ElementType type) {
  const std::string p = "model.layers.0.block_sparse_moe.";
  return {{p + "gate.weight", MakeTensor(type, {2, 2}, {1, 0, 0, 1})},
          {p + "experts.0.w1.weight", MakeTensor(type, {1, 2}, {1, 2})},
          {p + "experts.0.w3.weight", MakeTensor(type, {1, 2}, {-1, 1})},
          {p + "experts.0.w2.weight", MakeTensor(type, {2, 1}, {3, -2})},
          {p + "experts.1.w1.weight", MakeTensor(type, {1, 2}, {0.5, 0})},
          {p + "experts.1.w3.weight", MakeTensor(type, {1, 2}, {0, 4})},
          {p + "experts.1.w2.weight", MakeTensor(type, {2, 1}, {1, 1})}};
}

class ReferenceModelTest : public ::testing::Test {
 protected:
  void WriteMixtral(ElementType type) {
    directory_.Write("config.json", kMixtralConfig);
    ASSERT_TRUE(WriteSafetensors(directory_.File("model.safetensors"), MixtralTensors(type)).ok());
  }
  TestDirectory directory_;
};

TEST_F(ReferenceModelTest, TinyExpertsGiveTheValuesComputedByHand) {
  for (const ElementType type : {ElementType::kF32, ElementType::kBf16, ElementType::kF16}) {
    WriteMixtral(type);
    const auto model = ReferenceModel::Open(directory_.path());
    ASSERT_TRUE(model.ok()) << model.status();
    // Expert 0 of (1, 3): gate 7, up 2, down (3, -2). Expert 1 of (2, 1): gate 1, up 4, down (1,
    // 1).
    const auto y = (*model)->Compute(0, {1, 3, 2, 1}, {0, 1}, {0.5, 2});
    ASSERT_TRUE(y.ok()) << y.status();
    const double a = 0.5 * Silu(7) * 2;
    const double b = 2 * Silu(1) * 4;
    EXPECT_THAT(*y, ElementsAre(DoubleNear(3 * a, 1e-13), DoubleNear(-2 * a, 1e-13),
                                DoubleNear(b, 1e-13), DoubleNear(b, 1e-13)));
  }
}

TEST_F(ReferenceModelTest, SingleFileIsReadBeforeAnIndexBesideItAsTheServiceDoes) {
  WriteMixtral(ElementType::kF32);
  directory_.Write("model.safetensors.index.json",
                   R"({"weight_map":{"x":"model-00001-of-00001.safetensors"}})");
  EXPECT_TRUE(ReferenceModel::Open(directory_.path()).ok());
  std::filesystem::remove(directory_.File("model.safetensors"));
  EXPECT_THAT(std::string(ReferenceModel::Open(directory_.path()).status().message()),
              HasSubstr("model-00001-of-00001.safetensors"));
  // One that is there and cannot be opened is not passed over for the index.
  std::filesystem::create_symlink("model.safetensors", directory_.File("model.safetensors"));
  EXPECT_THAT(std::string(ReferenceModel::Open(directory_.path()).status().message()),
              HasSubstr("/model.safetensors'"));
}

TEST_F(ReferenceModelTest, UnusedSlotsCountNothingAndRepeatedIdsTwice) {
  WriteMixtral(ElementType::kF32);
  const auto model = ReferenceModel::Open(directory_.path());
  ASSERT_TRUE(model.ok()) << model.status();
  const auto y = (*model)->Compute(0, {2, 1, 2, 1}, {-1, -1, 1, 1}, {1, 1, 1, 0.5});
  ASSERT_TRUE(y.ok()) << y.status();
  const double b = 1.5 * Silu(1) * 4;
  EXPECT_THAT(*y, ElementsAre(0, 0, DoubleNear(b, 1e-13), DoubleNear(b, 1e-13)));
  const auto none = (*model)->Compute(0, {}, {}, {});
  ASSERT_TRUE(none.ok());
  EXPECT_TRUE(none->empty());
}

TEST_F(ReferenceModelTest, RouteFollowsTheRouterOfTheLayer) {
  WriteMixtral(ElementType::kF32);
  const auto model = ReferenceModel::Open(directory_.path());
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_TRUE((*model)->has_router());
  const auto routes = (*model)->Route(0, {5, 1, 0, 4});
  ASSERT_TRUE(routes.ok()) << routes.status();
  EXPECT_THAT((*routes)[0].ids, ElementsAre(0));
  EXPECT_THAT((*routes)[1].ids, ElementsAre(1));
  EXPECT_THAT((*routes)[1].weights, ElementsAre(1.0));
  EXPECT_EQ((*model)->Route(1, {5, 1}).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ReferenceModelTest, SmallCacheGivesTheSameValues) {
  WriteMixtral(ElementType::kF32);
  const auto large = ReferenceModel::Open(directory_.path());
  const auto small = ReferenceModel::Open(directory_.path(), /*cache_bytes=*/1);
  ASSERT_TRUE(large.ok() && small.ok());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(*(*small)->Compute(0, {1, 3, 2, 1}, {0, 1}, {0.5, 2}),
              *(*large)->Compute(0, {1, 3, 2, 1}, {0, 1}, {0.5, 2}));
  }
}

TEST_F(ReferenceModelTest, IdOutsideTheExpertsIsRefused) {
  WriteMixtral(ElementType::kF32);
  const auto model = ReferenceModel::Open(directory_.path());
  ASSERT_TRUE(model.ok());
  for (const std::int64_t id : {2, -2}) {
    EXPECT_EQ((*model)->Compute(0, {1, 3}, {id}, {1}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(ReferenceModelTest, Fp8WeightsAreScaledByTheirBlock) {
  // H 130 spans two blocks of columns; I 1.
  directory_.Write("config.json",
                   R"({"model_type":"deepseek_v3","hidden_size":130,"moe_intermediate_size":1,)"
                   R"("num_hidden_layers":2,"n_routed_experts":1,"num_experts_per_tok":1,)"
                   R"("first_k_dense_replace":1,"n_group":1,"topk_group":1})");
  std::vector<double> gate(130, 0.0);
  gate[0] = 2;
  gate[129] = 1;
  const std::string p = "model.layers.1.mlp.experts.0.";
  const auto fp8 = ElementType::kF8E4m3;
  std::map<std::string, Tensor> tensors = {
      {p + "gate_proj.weight", MakeTensor(fp8, {1, 130}, gate)},
      {p + "gate_proj.weight_scale_inv", MakeTensor(ElementType::kF32, {1, 2}, {0.5, 10})},
      {p + "up_proj.weight", MakeTensor(fp8, {1, 130}, gate)},
      {p + "up_proj.weight_scale_inv", MakeTensor(ElementType::kF32, {1, 2}, {1, 1})},
      {p + "down_proj.weight", MakeTensor(fp8, {130, 1}, std::vector<double>(130, 1))},
      {p + "down_proj.weight_scale_inv", MakeTensor(ElementType::kF32, {2, 1}, {3, 4})}};
  ASSERT_TRUE(WriteSafetensors(directory_.File("model.safetensors"), tensors).ok());
  const auto model = ReferenceModel::Open(directory_.path());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_FALSE((*model)->has_router());
  EXPECT_THAT((*model)->config().layers, ElementsAre(1));
  std::vector<double> x(130, 0.0);
  x[0] = 1;
  x[129] = 0.25;
  const auto y = (*model)->Compute(1, x, {0}, {1});
  ASSERT_TRUE(y.ok()) << y.status();
  // gate = 2 * 0.5 * 1 + 1 * 10 * 0.25, up = 2 + 0.25; rows of down below 128 times 3, above
  // times 4.
  EXPECT_NEAR((*y)[127], Silu(3.5) * 2.25 * 3, 1e-12);
  EXPECT_NEAR((*y)[128], Silu(3.5) * 2.25 * 4, 1e-12);

  tensors.erase(p + "up_proj.weight_scale_inv");
  ASSERT_TRUE(WriteSafetensors(directory_.File("model.safetensors"), tensors).ok());
  const auto unscaled = ReferenceModel::Open(directory_.path());
  ASSERT_TRUE(unscaled.ok());
  const auto refused = (*unscaled)->Compute(1, x, {0}, {1});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("up_proj.weight_scale_inv"));
}

TEST_F(ReferenceModelTest, ShardsAreFoundByTheIndex) {
  directory_.Write("config.json", kMixtralConfig);
  std::map<std::string, Tensor> first;
  std::map<std::string, Tensor> second;
  std::string map;
  int i = 0;
  for (auto& [name, tensor] : MixtralTensors(ElementType::kF32)) {
    const bool odd = i++ % 2 != 0;
    map +=
        (map.empty() ? "" : ",") + ("\"" + name + "\":\"" + (odd ? "b" : "a") + ".safetensors\"");
    (odd ? second : first)[name] = tensor;
  }
  ASSERT_TRUE(WriteSafetensors(directory_.File("a.safetensors"), first).ok());
  ASSERT_TRUE(WriteSafetensors(directory_.File("b.safetensors"), second).ok());
  directory_.Write("model.safetensors.index.json", "{\"weight_map\":{" + map + "}}");
  const auto model = ReferenceModel::Open(directory_.path());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->Compute(0, {1, 3}, {0}, {1}).ok());

  std::filesystem::remove(directory_.File("b.safetensors"));
  const auto missing = ReferenceModel::Open(directory_.path());
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("b.safetensors"));
}

TEST_F(ReferenceModelTest, ShardNameThatLeavesTheDirectoryIsRefused) {
  directory_.Write("config.json", kMixtralConfig);
  for (const char* shard : {"../a.safetensors", "/a.safetensors", "..", "", "a/b"}) {
    directory_.Write("model.safetensors.index.json",
                     std::string("{\"weight_map\":{\"t\":\"") + shard + "\"}}");
    const auto model = ReferenceModel::Open(directory_.path());
    EXPECT_EQ(model.status().code(), absl::StatusCode::kDataLoss) << shard;
    EXPECT_THAT(std::string(model.status().message()), HasSubstr("plain file name"));
  }
}

TEST_F(ReferenceModelTest, WrongShapeOrTypeIsRefusedByName) {
  directory_.Write("config.json", kMixtralConfig);
  const std::string name = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
  for (const Tensor& bad : {MakeTensor(ElementType::kF32, {2, 1}, {1, 2}),
                            Tensor{ElementType::kU8, {1, 2}, std::string("ab")}}) {
    auto tensors = MixtralTensors(ElementType::kF32);
    tensors[name] = bad;
    ASSERT_TRUE(WriteSafetensors(directory_.File("model.safetensors"), tensors).ok());
    const auto model = ReferenceModel::Open(directory_.path());
    ASSERT_TRUE(model.ok()) << model.status();
    const auto y = (*model)->Compute(0, {1, 3}, {0}, {1});
    EXPECT_EQ(y.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(y.status().message()), HasSubstr(name));
  }
}

TEST_F(ReferenceModelTest, BadConfigIsRefusedByField) {
  const auto error = [](const std::string& text) {
    return std::string(ParseReferenceConfig(text).status().message());
  };
  EXPECT_THAT(error("nonsense"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error("{}"), HasSubstr("model_type is missing"));
  EXPECT_THAT(error(R"({"model_type":"llama"})"), HasSubstr("\"llama\" is not one of"));
  EXPECT_THAT(error(R"({"model_type":"mixtral","hidden_size":2.5})"),
              HasSubstr("hidden_size is 2.5"));
  std::string config = kMixtralConfig;
  config.replace(config.find("per_tok\":1"), 10, "per_tok\":3");
  EXPECT_THAT(error(config), HasSubstr("num_experts_per_tok is 3"));
}

TEST_F(ReferenceModelTest, QwenLayersFollowSparseStepAndDenseList) {
  const auto config = ParseReferenceConfig(
      R"({"model_type":"qwen3_moe","hidden_size":2,"moe_intermediate_size":1,)"
      R"("num_hidden_layers":6,"num_experts":4,"num_experts_per_tok":2,"norm_topk_prob":true,)"
      R"("decoder_sparse_step":2,"mlp_only_layers":[3]})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->layers, ElementsAre(1, 5));
  EXPECT_TRUE(config->normalise_topk);
}

TEST(RelativeL2ErrorTest, SkippedRowsDoNotCountAndNanIsInfinite) {
  EXPECT_DOUBLE_EQ(RelativeL2Error({3, 4}, {3, 5}, 1, {}), 1 / std::sqrt(34));
  EXPECT_EQ(RelativeL2Error({3, 9}, {3, 4}, 1, {false, true}), 0);
  EXPECT_EQ(RelativeL2Error({0.5}, {0}, 1, {}), 0.5);
  EXPECT_TRUE(std::isinf(RelativeL2Error({std::nan("")}, {1}, 1, {})));
}

}  // namespace
}  // namespace epserve::client
