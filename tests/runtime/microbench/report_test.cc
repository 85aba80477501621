#include "runtime/microbench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "runtime/microbench/workload.h"

namespace epserve::runtime {
namespace {

TEST(PercentilesOfTest, AreNearestRanksOfTheSortedSamples) {
  std::vector<double> samples;
  for (int i = 100; i >= 1; --i) samples.push_back(i);
  EXPECT_EQ(PercentilesOf(samples).p50_us, 50.0);
  EXPECT_EQ(PercentilesOf(samples).p99_us, 99.0);
  EXPECT_EQ(PercentilesOf({7.0}).p50_us, 7.0);
  EXPECT_EQ(PercentilesOf({7.0}).p99_us, 7.0);
  EXPECT_EQ(PercentilesOf({3.0, 1.0, 2.0}).p50_us, 2.0);
}

TEST(MakeReportTest, PhaseLastsFromTheFirstBeginToTheLastEnd) {
  BenchParams params;
  params.num_ranks = 2;
  params.iterations = 1;
  params.hidden = 8;
  params.dtype = DataType::kBf16;
  auto coordination = Coordination::Create(params);
  ASSERT_TRUE(coordination.ok()) << coordination.status();
  for (const Phase phase : {Phase::kCopy, Phase::kDispatch, Phase::kCombine}) {
    const std::int64_t offset = static_cast<std::int64_t>(phase) * 1000;
    coordination->span(phase, 0, 0) = {1'000, 4'000 + offset};
    coordination->span(phase, 0, 1) = {2'000, 3'000};
  }
  const BenchReport report = MakeReport(*coordination);
  EXPECT_EQ(report.copy.p50_us, 3.0);
  EXPECT_EQ(report.dispatch.p50_us, 4.0);
  EXPECT_EQ(report.combine.p50_us, 5.0);
  EXPECT_THAT(FormatTable(report), testing::HasSubstr("combine"));
}

TEST(MaxRelativeErrorTest, OneWrongElementOfOneTokenIsSeen) {
  BenchParams params;
  params.num_ranks = 1;
  params.tokens_per_rank = 3;
  params.hidden = 16;
  params.topk = 2;
  params.num_experts = 4;
  params.dtype = DataType::kFp32;
  const Workload workload = MakeWorkload(params, 0);
  std::vector<std::byte> out = workload.x;
  auto* values = reinterpret_cast<float*>(out.data());
  for (std::int64_t t = 0; t < 3; ++t) {
    float factor = 0.0f;
    for (int k = 0; k < 2; ++k) {
      factor += workload.topk_weights[t * 2 + k] *
                (1.0f + static_cast<float>(workload.topk_ids[t * 2 + k]) / 4.0f);
    }
    for (int h = 0; h < 16; ++h) values[t * 16 + h] *= factor;
  }
  EXPECT_LE(MaxRelativeError(params, workload, out), ErrorLimit(DataType::kFp32));
  const float right = values[20];
  values[20] += 0.5f;
  EXPECT_GT(MaxRelativeError(params, workload, out), ErrorLimit(DataType::kBf16));
  values[20] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(MaxRelativeError(params, workload, out), std::numeric_limits<double>::infinity());
  values[20] = right;
}

}  // namespace
}  // namespace epserve::runtime
