#include "server/common/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

namespace epserve::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr std::int64_t kHidden = 16;

// A made-up FFN: rank r's probe expert gives (r + 1) * x.
std::vector<std::vector<float>> References(const runtime::Placement& placement) {
  std::vector<std::vector<float>> references;
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    std::vector<float> row;
    if (placement.num_local_experts(rank) > 0) row = ProbeRow(kHidden);
    for (float& value : row) value *= static_cast<float>(rank + 1);
    references.push_back(std::move(row));
  }
  return references;
}

std::vector<float> RightOutput(const ProbeBatch& batch, const runtime::Placement& placement) {
  std::vector<float> output(batch.hidden.size(), 0.0f);
  const std::size_t topk = batch.topk_ids.size() / static_cast<std::size_t>(batch.num_tokens);
  for (std::size_t place = 0; place < batch.topk_ids.size(); ++place) {
    if (batch.topk_ids[place] < 0) continue;
    const float factor = static_cast<float>(placement.OwnerOf(batch.topk_ids[place]) + 1);
    for (std::int64_t h = 0; h < kHidden; ++h) {
      const std::size_t at = place / topk * kHidden + static_cast<std::size_t>(h);
      output[at] += batch.topk_weights[place] * factor * batch.hidden[at];
    }
  }
  return output;
}

TEST(ProbeTest, ValuesAreTheDocumentedHash) {
  // Worked out apart from this code, in Python, from the formula of the header.
  EXPECT_EQ(ProbeValue(0), -0.40817320346832275f);
  EXPECT_EQ(ProbeValue(1), -0.4537537097930908f);
  EXPECT_EQ(ProbeValue(4095), 0.3554264307022095f);
  for (std::uint32_t index = 0; index < 100000; ++index) {
    ASSERT_GE(ProbeValue(index), -1.0f);
    ASSERT_LT(ProbeValue(index), 1.0f);
  }
}

TEST(ProbeTest, TokensGoToConsecutiveRanksThatOwnExperts) {
  // Three experts over four ranks: the last owns none.
  const runtime::Placement placement = runtime::EvenPlacement(3, 4);
  const ProbeBatch batch = MakeProbeBatch(placement, kHidden, 4);
  EXPECT_EQ(batch.num_tokens, 8);
  EXPECT_EQ(ProbeExpert(placement, 3), -1);
  EXPECT_THAT(std::vector<std::int32_t>(batch.topk_ids.begin() + 4, batch.topk_ids.begin() + 8),
              ElementsAre(1, 2, 0, -1));
  EXPECT_THAT(std::vector<float>(batch.topk_weights.begin() + 4, batch.topk_weights.begin() + 8),
              ElementsAre(0.5f, 1.0f / 3.0f, 0.25f, 0.0f));
}

TEST(ProbeTest, RightOutputPassesForAnyShape) {
  for (int num_ranks : {1, 2, 3, 8}) {
    for (int topk : {1, 2, 16}) {
      const runtime::Placement placement = runtime::EvenPlacement(5, num_ranks);
      const ProbeBatch batch = MakeProbeBatch(placement, kHidden, topk);
      EXPECT_TRUE(VerifyProbe(batch, placement, kHidden, References(placement),
                              RightOutput(batch, placement), ProbeTolerance("host"))
                      .ok());
    }
  }
}

TEST(ProbeTest, WrongOutputIsInternalAndNamesRowAndRanks) {
  const runtime::Placement placement = runtime::EvenPlacement(4, 2);
  const ProbeBatch batch = MakeProbeBatch(placement, kHidden, 2);
  std::vector<float> output = RightOutput(batch, placement);
  output[kHidden + 3] += 0.5f;
  const absl::Status status =
      VerifyProbe(batch, placement, kHidden, References(placement), output, ProbeTolerance("host"));
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("row 1 (ranks 1, 0)"));
}

TEST(ProbeTest, BackendsOnGpusMayBeOffByWhatTheirTypesRound) {
  const runtime::Placement placement = runtime::EvenPlacement(4, 2);
  const ProbeBatch batch = MakeProbeBatch(placement, kHidden, 2);
  std::vector<float> output = RightOutput(batch, placement);
  for (float& value : output) value *= 1.05f;
  const auto check = [&](const char* backend) {
    return VerifyProbe(batch, placement, kHidden, References(placement), output,
                       ProbeTolerance(backend))
        .ok();
  };
  EXPECT_FALSE(check("host"));
  EXPECT_TRUE(check("cuda"));
  EXPECT_TRUE(check("nccl"));
}

TEST(ProbeTest, NotANumberNeverPasses) {
  const runtime::Placement placement = runtime::EvenPlacement(4, 2);
  const ProbeBatch batch = MakeProbeBatch(placement, kHidden, 2);
  std::vector<float> output = RightOutput(batch, placement);
  output[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(
      VerifyProbe(batch, placement, kHidden, References(placement), output, ProbeTolerance("host"))
          .ok());
}

TEST(ProbeTest, MissingReferenceOrShortOutputIsInternal) {
  const runtime::Placement placement = runtime::EvenPlacement(4, 2);
  const ProbeBatch batch = MakeProbeBatch(placement, kHidden, 2);
  std::vector<float> output = RightOutput(batch, placement);
  std::vector<std::vector<float>> references = References(placement);
  references[1].clear();
  EXPECT_THAT(
      std::string(VerifyProbe(batch, placement, kHidden, references, output, ProbeTolerance("host"))
                      .message()),
      HasSubstr("rank 1"));
  output.pop_back();
  EXPECT_FALSE(
      VerifyProbe(batch, placement, kHidden, References(placement), output, ProbeTolerance("host"))
          .ok());
}

}  // namespace
}  // namespace epserve::server
