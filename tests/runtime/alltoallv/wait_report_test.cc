#include "runtime/alltoallv/wait_report.h"

#include <gtest/gtest.h>

namespace epserve::runtime {
namespace {

WaitReport Report(WaitStage stage, bool aborted) {
  return {static_cast<std::uint32_t>(stage), 3, 51'500'000, aborted ? 1u : 0u};
}

TEST(WaitReportTest, EmptyReportIsOk) {
  WaitReport report{};
  EXPECT_TRUE(StatusOfWaits(&report, 0, absl::Milliseconds(50)).ok());
}

TEST(WaitReportTest, WaitThatTimedOutNamesStageRanksAndTimes) {
  WaitReport report = Report(WaitStage::kCombine, false);
  EXPECT_EQ(StatusOfWaits(&report, 1, absl::Milliseconds(50)),
            absl::DeadlineExceededError("combine: rank 1 waited 51.5 ms for rank 3, longer than "
                                        "the peer timeout of 50 ms"));
}

TEST(WaitReportTest, WaitThatWasEndedIsAborted) {
  WaitReport report = Report(WaitStage::kDispatch, true);
  EXPECT_EQ(StatusOfWaits(&report, 1, absl::Milliseconds(50)),
            absl::AbortedError("dispatch: rank 1 was told to stop while it waited for rank 3, "
                               "after 51.5 ms"));
}

TEST(WaitReportTest, EveryStageHasAName) {
  for (const WaitStage stage :
       {WaitStage::kDispatch, WaitStage::kCombine, WaitStage::kBarrier, WaitStage::kCounts}) {
    WaitReport report = Report(stage, false);
    const absl::Status status = StatusOfWaits(&report, 1, absl::Milliseconds(50));
    EXPECT_EQ(status.message().find("unknown"), std::string::npos) << status;
  }
}

}  // namespace
}  // namespace epserve::runtime
