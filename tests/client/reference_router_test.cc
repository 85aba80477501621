#include "client/cpp/reference_router.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace epserve::client {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;

ReferenceConfig Config(Architecture architecture, std::int64_t experts, std::int64_t topk) {
  ReferenceConfig config;
  config.architecture = architecture;
  config.num_experts = experts;
  config.topk = topk;
  return config;
}

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

TEST(ReferenceRouterTest, MixtralRenormalisesOverTheChosen) {
  // softmax over the two chosen: e^2 and e^1.
  const TokenRoute route = RouteToken(Config(Architecture::kMixtral, 4, 2), {1, -3, 2, 0}, {});
  EXPECT_THAT(route.ids, ElementsAre(2, 0));
  const double first = std::exp(2) / (std::exp(2) + std::exp(1));
  EXPECT_THAT(route.weights, ElementsAre(DoubleNear(first, 1e-15), DoubleNear(1 - first, 1e-15)));
}

TEST(ReferenceRouterTest, QwenWithoutNormalisationKeepsTheSoftmax) {
  ReferenceConfig config = Config(Architecture::kQwen3Moe, 3, 2);
  config.normalise_topk = false;
  const TokenRoute route = RouteToken(config, {std::log(1), std::log(2), std::log(5)}, {});
  EXPECT_THAT(route.ids, ElementsAre(2, 1));
  EXPECT_THAT(route.weights, ElementsAre(DoubleNear(5.0 / 8, 1e-15), DoubleNear(2.0 / 8, 1e-15)));
  config.normalise_topk = true;
  const TokenRoute normalised = RouteToken(config, {std::log(1), std::log(2), std::log(5)}, {});
  EXPECT_THAT(normalised.weights,
              ElementsAre(DoubleNear(5.0 / 7, 1e-15), DoubleNear(2.0 / 7, 1e-15)));
}

TEST(ReferenceRouterTest, LogitsFarFromZeroDoNotOverflow) {
  const TokenRoute route = RouteToken(Config(Architecture::kMixtral, 2, 2), {1000, 999}, {});
  EXPECT_THAT(route.ids, ElementsAre(0, 1));
  EXPECT_NEAR(route.weights[0], Sigmoid(1), 1e-12);
}

TEST(ReferenceRouterTest, DeepseekChoosesByBiasAndWeighsWithoutIt) {
  ReferenceConfig config = Config(Architecture::kDeepseekV3, 4, 2);
  config.routed_scaling_factor = 2.5;
  // The bias lifts expert 3 over expert 0.
  const TokenRoute route = RouteToken(config, {1, 2, -1, 0}, {0, 0, 0, 0.5});
  EXPECT_THAT(route.ids, ElementsAre(3, 1));
  const double sum = Sigmoid(0) + Sigmoid(2);
  EXPECT_THAT(route.weights, ElementsAre(DoubleNear(2.5 * Sigmoid(0) / sum, 1e-12),
                                         DoubleNear(2.5 * Sigmoid(2) / sum, 1e-12)));
}

TEST(ReferenceRouterTest, DeepseekWithoutNormalisationScalesTheScores) {
  ReferenceConfig config = Config(Architecture::kDeepseekV3, 2, 1);
  config.normalise_topk = false;
  config.routed_scaling_factor = 3;
  const TokenRoute route = RouteToken(config, {1, 0}, {0, 0});
  EXPECT_THAT(route.weights, ElementsAre(DoubleNear(3 * Sigmoid(1), 1e-15)));
}

TEST(ReferenceRouterTest, DeepseekLeavesOutGroupsEvenWithTheBestExpert) {
  ReferenceConfig config = Config(Architecture::kDeepseekV3, 6, 2);
  config.num_groups = 3;
  config.topk_groups = 1;
  // Group 0 holds the single best expert; group 2 the best sum of two.
  const TokenRoute route = RouteToken(config, {4, -4, 0, 0, 1, 1.5}, std::vector<double>(6, 0.0));
  EXPECT_THAT(route.ids, ElementsAre(5, 4));
}

TEST(ReferenceRouterTest, GroupScoreIsOfTheTwoBestAlone) {
  ReferenceConfig config = Config(Architecture::kDeepseekV3, 6, 1);
  config.num_groups = 2;
  config.topk_groups = 1;
  // All three of group 0 sum higher; the two best of group 1 do.
  const TokenRoute route =
      RouteToken(config, {0.5, 0.5, 0.5, 1, 1, -9}, std::vector<double>(6, 0.0));
  EXPECT_THAT(route.ids, ElementsAre(3));
}

TEST(ReferenceRouterTest, MarginSaysHowCloseTheChoiceWas) {
  const ReferenceConfig config = Config(Architecture::kMixtral, 3, 1);
  EXPECT_NEAR(RouteToken(config, {0, 1e-8, -5}, {}).margin, 1e-8, 1e-12);
  EXPECT_GT(RouteToken(config, {0, 2, -5}, {}).margin, 0.5);
  EXPECT_EQ(RouteToken(Config(Architecture::kMixtral, 2, 2), {0, 0}, {}).margin,
            std::numeric_limits<double>::infinity());
  ReferenceConfig grouped = Config(Architecture::kDeepseekV3, 4, 1);
  grouped.num_groups = 2;
  grouped.topk_groups = 1;
  // The experts of the chosen group are far apart, but the groups are equal.
  EXPECT_EQ(RouteToken(grouped, {3, -3, 3, -3}, {0, 0, 0, 0}).margin, 0.0);
}

}  // namespace
}  // namespace epserve::client
