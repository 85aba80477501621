#include "runtime/routing/router.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/support/reference_router.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::ReferenceRouting;
using ::epserve::testing::RouteInDouble;

struct Case {
  RouterConfig config;
  std::vector<float> gate, bias, x;
  std::int64_t num_rows = 0;

  Case(const RouterConfig& c, std::int64_t rows, std::uint64_t seed) : config(c), num_rows(rows) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    gate.resize(static_cast<std::size_t>(c.num_experts * c.hidden));
    for (float& v : gate) v = normal(random) / std::sqrt(static_cast<float>(c.hidden));
    x.resize(static_cast<std::size_t>(rows * c.hidden));
    for (float& v : x) v = normal(random);
    if (c.kind != RouterKind::kGroupedSigmoid) return;
    bias.resize(static_cast<std::size_t>(c.num_experts));
    for (float& v : bias) v = 0.2f * normal(random);
  }

  // Poisoned outputs, so that a place not written shows.
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  void Route() {
    ids.assign(static_cast<std::size_t>(num_rows * config.topk), -777);
    weights.assign(ids.size(), -777.0f);
    std::vector<float> scratch(static_cast<std::size_t>(RouterScratchFloats(config)), -777.0f);
    RouteRows(config, gate.data(), bias.empty() ? nullptr : bias.data(), x.data(), num_rows,
              scratch, ids.data(), weights.data());
  }

  ReferenceRouting Reference(std::int64_t row) const {
    return RouteInDouble(config, {gate.begin(), gate.end()}, {bias.begin(), bias.end()},
                         {x.begin() + row * config.hidden, x.begin() + (row + 1) * config.hidden});
  }

  void ExpectMatchesReference() {
    Route();
    int compared = 0;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const ReferenceRouting want = Reference(row);
      if (want.margin < 1e-5) continue;  // Decided by the last bits of a sum.
      ++compared;
      for (int k = 0; k < config.topk; ++k) {
        const auto at = static_cast<std::size_t>(row * config.topk + k);
        const auto slot = static_cast<std::size_t>(k);
        EXPECT_EQ(ids[at], want.ids[slot]) << "row " << row << " k " << k;
        EXPECT_NEAR(weights[at], want.weights[slot], 1e-5 * (1.0 + want.weights[slot]))
            << "row " << row << " k " << k;
      }
    }
    EXPECT_GT(compared, num_rows / 2);
  }
};

RouterConfig Softmax(std::int64_t hidden, std::int64_t experts, int topk, bool renormalise) {
  return {.kind = RouterKind::kSoftmax,
          .hidden = hidden,
          .num_experts = experts,
          .topk = topk,
          .renormalise = renormalise};
}

RouterConfig Grouped(std::int64_t hidden, std::int64_t experts, int topk, int groups,
                     int topk_groups, float scaling, bool renormalise = true) {
  return {.kind = RouterKind::kGroupedSigmoid,
          .hidden = hidden,
          .num_experts = experts,
          .topk = topk,
          .renormalise = renormalise,
          .num_groups = groups,
          .topk_groups = topk_groups,
          .scaling_factor = scaling};
}

TEST(RouterTest, SoftmaxWithRenormalisationMatchesDoubleReference) {
  Case(Softmax(64, 8, 2, true), 200, 1).ExpectMatchesReference();
  Case(Softmax(37, 13, 5, true), 200, 2).ExpectMatchesReference();  // Neither fills a vector.
}

TEST(RouterTest, SoftmaxWithoutRenormalisationMatchesDoubleReference) {
  Case(Softmax(128, 64, 8, false), 200, 3).ExpectMatchesReference();
}

TEST(RouterTest, GroupedSigmoidMatchesDoubleReference) {
  Case(Grouped(64, 32, 6, 8, 4, 2.5f), 300, 4).ExpectMatchesReference();
  Case(Grouped(48, 24, 4, 3, 1, 1.0f), 300, 5).ExpectMatchesReference();
  Case(Grouped(64, 16, 4, 1, 1, 2.5f, false), 300, 6).ExpectMatchesReference();
}

// With renormalisation, Mixtral's weights are the softmax over the chosen logits alone.
TEST(RouterTest, RenormalisedWeightsAreSoftmaxOverChosenLogits) {
  Case one(Softmax(2, 3, 2, true), 1, 7);
  one.gate = {1, 0, 0, 1, 1, 1};
  one.x = {0.5f, 1.0f};  // Logits 0.5, 1, 1.5.
  one.Route();
  EXPECT_EQ(one.ids, (std::vector<std::int32_t>{2, 1}));
  const double first = std::exp(1.5) / (std::exp(1.5) + std::exp(1.0));
  EXPECT_NEAR(one.weights[0], first, 1e-6);
  EXPECT_NEAR(one.weights[1], 1.0 - first, 1e-6);
}

TEST(RouterTest, CorrectionBiasDecidesChoiceButNotWeight) {
  Case one(Grouped(1, 4, 1, 1, 1, 2.0f, false), 1, 8);
  one.gate = {3, 1, 0, 2};
  one.x = {1.0f};
  one.bias = {0.0f, 5.0f, 0.0f, 0.0f};
  one.Route();
  EXPECT_EQ(one.ids, (std::vector<std::int32_t>{1}));
  EXPECT_NEAR(one.weights[0], 2.0 / (1.0 + std::exp(-1.0)), 1e-6);
}

TEST(RouterTest, GroupIsChosenByItsTwoBestAndLimitsTheChoice) {
  // Group 0 has the single best expert, group 1 the better pair.
  Case one(Grouped(1, 4, 2, 2, 1, 1.0f), 1, 9);
  one.gate = {4, -4, 2, 1};
  one.x = {1.0f};
  one.bias.assign(4, 0.0f);
  one.Route();
  EXPECT_EQ(one.ids, (std::vector<std::int32_t>{2, 3}));
}

// A bias may make every choice negative; experts of the other groups stay out even then.
TEST(RouterTest, NegativeChoicesStayInTheirGroups) {
  Case one(Grouped(1, 4, 2, 2, 1, 1.0f), 1, 9);
  one.gate = {4, -4, 2, 1};
  one.x = {1.0f};
  one.bias.assign(4, -1.5f);
  one.Route();
  EXPECT_EQ(one.ids, (std::vector<std::int32_t>{2, 3}));
}

TEST(RouterTest, EqualScoresGoToLowerId) {
  Case even(Softmax(4, 6, 3, true), 1, 10);
  std::fill(even.gate.begin(), even.gate.end(), 0.25f);
  even.Route();
  EXPECT_EQ(even.ids, (std::vector<std::int32_t>{0, 1, 2}));
}

TEST(RouterTest, NonFiniteRowPoisonsItsOwnWeightsAlone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const RouterConfig& config : {Softmax(32, 8, 3, true), Grouped(32, 8, 3, 2, 2, 2.5f)}) {
    Case clean(config, 6, 11);
    clean.Route();
    Case dirty = clean;
    dirty.x[2 * 32 + 5] = nan;
    dirty.x[4 * 32 + 1] = inf;
    dirty.x[4 * 32 + 2] = -inf;
    dirty.Route();
    for (std::size_t row = 0; row < 6; ++row) {
      for (std::size_t k = 0; k < 3; ++k) {
        const std::size_t at = row * 3 + k;
        EXPECT_GE(dirty.ids[at], -1);
        EXPECT_LT(dirty.ids[at], 8);
        if (row == 2) {
          EXPECT_TRUE(std::isnan(dirty.weights[at]));
        } else if (row != 4) {
          EXPECT_EQ(dirty.ids[at], clean.ids[at]);
          EXPECT_EQ(dirty.weights[at], clean.weights[at]);
        }
      }
    }
  }
}

TEST(RouterTest, RowDoesNotDependOnItsNeighbours) {
  Case all(Grouped(64, 32, 6, 8, 4, 2.5f), 9, 12);
  all.Route();
  for (std::int64_t row = 0; row < 9; ++row) {
    Case one = all;
    one.x.assign(all.x.begin() + row * 64, all.x.begin() + (row + 1) * 64);
    one.num_rows = 1;
    one.Route();
    for (std::size_t k = 0; k < 6; ++k) {
      EXPECT_EQ(one.ids[k], all.ids[static_cast<std::size_t>(row) * 6 + k]);
      EXPECT_EQ(one.weights[k], all.weights[static_cast<std::size_t>(row) * 6 + k]);
    }
  }
}

TEST(RouterTest, ImpossibleConfigIsRefusedNamingTheValue) {
  const auto message = [](const RouterConfig& config) {
    const absl::Status status = ValidateRouterConfig(config);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_NE(message(Softmax(8, 4, 5, true)).find("topk 5"), std::string::npos);
  EXPECT_NE(message(Softmax(8, 4, 0, true)).find("topk 0"), std::string::npos);
  EXPECT_NE(message(Grouped(8, 10, 2, 4, 2, 1.0f)).find("n_group 4"), std::string::npos);
  EXPECT_NE(message(Grouped(8, 8, 2, 8, 2, 1.0f)).find("n_group 8"), std::string::npos);
  EXPECT_NE(message(Grouped(8, 8, 2, 2, 3, 1.0f)).find("topk_group 3"), std::string::npos);
  EXPECT_NE(message(Grouped(8, 8, 5, 2, 1, 1.0f)).find("topk 5"), std::string::npos);
  EXPECT_TRUE(ValidateRouterConfig(Grouped(8, 8, 4, 2, 1, 1.0f)).ok());
}

}  // namespace
}  // namespace epserve::runtime
