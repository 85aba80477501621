#include "runtime/microbench/ffn_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace epserve::runtime {
namespace {

TEST(FfnExpertOffsetsTest, EvenSharesDifferByAtMostOneRow) {
  FfnBenchParams params;
  params.rows = 103;
  params.experts = 8;
  const auto offsets = FfnExpertOffsets(params);
  ASSERT_EQ(offsets.size(), 9u);
  EXPECT_EQ(offsets.front(), 0);
  EXPECT_EQ(offsets.back(), 103);
  for (int e = 0; e < 8; ++e) EXPECT_NEAR(offsets[e + 1] - offsets[e], 103.0 / 8, 1.0);
}

TEST(FfnExpertOffsetsTest, SkewedSharesFallAsOneOverRankInTheSeedsOrder) {
  FfnBenchParams params;
  params.rows = 10'000;
  params.experts = 4;
  params.distribution = RowDistribution::kSkewed;
  const auto rows = [&] {
    const auto offsets = FfnExpertOffsets(params);
    std::vector<int> counts;
    for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
      counts.push_back(offsets[e + 1] - offsets[e]);
    }
    return counts;
  };
  std::vector<int> counts = rows();
  EXPECT_EQ(rows(), counts);
  std::sort(counts.begin(), counts.end());
  const double harmonic = 1.0 + 1.0 / 2 + 1.0 / 3 + 1.0 / 4;
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(counts[3 - i], 10'000 / harmonic / (i + 1), 1.0);
}

TEST(FfnReportTest, RatesFollowFromTimesAndSizes) {
  FfnBenchReport report;
  report.kernel = "hopper-wgmma-bf16";
  report.params.rows = 1000;
  report.params.hidden = 1000;
  report.params.intermediate = 1000;
  report.ffn = {6.0, 7.0};
  report.dense_us = 3.0;
  report.copy_gbps = 4000.0;
  report.weight_bytes = 12'000'000;
  const auto json = nlohmann::json::parse(FormatFfnJson(report), nullptr, false);
  ASSERT_TRUE(json.is_object()) << FormatFfnJson(report);
  EXPECT_EQ(json["kernel"], "hopper-wgmma-bf16");
  EXPECT_DOUBLE_EQ(json["tflops"], 1000.0);  // 6e9 operations in 6 us
  EXPECT_DOUBLE_EQ(json["dense_tflops"], 2000.0);
  EXPECT_DOUBLE_EQ(json["tflops_to_dense"], 0.5);
  EXPECT_DOUBLE_EQ(json["weight_gbps"], 2000.0);
  EXPECT_DOUBLE_EQ(json["weight_gbps_to_copy"], 0.5);
  EXPECT_DOUBLE_EQ(json["grouped_tflops"], 0.0);  // not measured
  EXPECT_THAT(FormatFfnTable(report), testing::HasSubstr("hopper-wgmma-bf16"));
}

}  // namespace
}  // namespace epserve::runtime
