#include "runtime/alltoallv/nccl_lanes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "tests/runtime/alltoallv/fake_nccl.h"

namespace epserve::runtime {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr absl::Duration kNoTimeout = absl::Seconds(60);
constexpr absl::Duration kShort = absl::Milliseconds(5);

class NcclLanesTest : public ::testing::Test {
 protected:
  static constexpr NcclLanesConfig kConfig = {
      .rank = 1, .num_ranks = 4, .num_lanes = 3, .max_blocks = 12};

  NcclLanesTest() { std::strcpy(id_.internal, "the id"); }

  absl::Status Open(absl::Duration timeout = kNoTimeout) {
    return lanes_.Open(id_, Deadline(timeout));
  }
  void OpenWell() {
    ASSERT_TRUE(Open().ok());
    nccl_.TakeCalls();
  }
  absl::Status Exchange(int lane, absl::Duration timeout = kNoTimeout) {
    const NcclTransfer transfers[] = {
        {.peer = 2, .send_bytes = 16, .recv_bytes = 32},
        {.peer = 3, .send_bytes = 0, .recv_bytes = 8},
        {.peer = 0, .send_bytes = 4, .recv_bytes = 0},
    };
    return lanes_.Exchange(lane, transfers, nullptr, timeout);
  }

  testing::FakeNccl nccl_;
  const NcclApi api_ = nccl_.api();
  ncclUniqueId id_ = {};
  NcclLanes lanes_{api_, kConfig};
};

TEST_F(NcclLanesTest, OpenMakesOneCommunicatorALaneThatDoesNotBlock) {
  nccl_.Answer(/*in_progress=*/5, ncclSuccess);
  ASSERT_TRUE(Open().ok());
  EXPECT_THAT(nccl_.TakeCalls(), ElementsAre("init 1 of 4 by the id", "split 1 color 0 key 1",
                                             "split 1 color 0 key 1"));
  EXPECT_GT(nccl_.num_polls(), 5);
  EXPECT_EQ(nccl_.config().blocking, 0);
  EXPECT_EQ(nccl_.config().maxCTAs, 12);
}

TEST_F(NcclLanesTest, OpenGivesUpAtItsDeadline) {
  nccl_.Answer(/*in_progress=*/-1, ncclSuccess);
  const absl::Status status = Open(kShort);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("open peers: rank 1 of 4 waited in vain"));
}

TEST_F(NcclLanesTest, OpenReportsWhatNcclReports) {
  nccl_.Answer(/*in_progress=*/1, ncclInternalError);
  const absl::Status status = Open();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("ncclCommInitRankConfig failed: an error (its cause)"));
}

TEST_F(NcclLanesTest, AbortEndsOpen) {
  nccl_.Answer(/*in_progress=*/-1, ncclSuccess);
  absl::Status status;
  std::thread opener([&] { status = Open(); });
  while (nccl_.num_polls() == 0) std::this_thread::yield();
  lanes_.Abort();
  opener.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
  EXPECT_THAT(nccl_.TakeCalls(), ElementsAre("init 1 of 4 by the id", "start", "abort 1", "end"));
}

TEST_F(NcclLanesTest, ExchangeMovesWhatHasASizeInOneGroupOfItsLane) {
  OpenWell();
  ASSERT_TRUE(Exchange(2).ok());
  EXPECT_THAT(nccl_.TakeCalls(), ElementsAre("start", "send 16 to 2 on 3", "recv 32 from 2 on 3",
                                             "recv 8 from 3 on 3", "send 4 to 0 on 3", "end"));
}

TEST_F(NcclLanesTest, ExchangeReturnsOnceNcclHasTakenIt) {
  OpenWell();
  nccl_.EndGroupsLater();
  nccl_.Answer(/*in_progress=*/7, ncclSuccess);
  const int polls_before = nccl_.num_polls();
  ASSERT_TRUE(Exchange(0).ok());
  EXPECT_EQ(nccl_.num_polls() - polls_before, 8);
}

TEST_F(NcclLanesTest, ExchangeThatNcclDoesNotTakeTimesOut) {
  OpenWell();
  nccl_.EndGroupsLater();
  nccl_.Answer(/*in_progress=*/-1, ncclSuccess);
  EXPECT_EQ(Exchange(0, kShort).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(NcclLanesTest, GroupEndsAfterAFailedSend) {
  OpenWell();
  nccl_.FailSends();
  const absl::Status status = Exchange(0);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(nccl_.TakeCalls(), ElementsAre("start", "send 16 to 2 on 1", "end"));
}

TEST_F(NcclLanesTest, AbortTellsAllCommunicatorsInOneGroupAndOnce) {
  OpenWell();
  lanes_.Abort();
  EXPECT_THAT(nccl_.TakeCalls(), ElementsAre("start", "abort 1", "abort 2", "abort 3", "end"));
  lanes_.Abort();
  EXPECT_EQ(Exchange(0).code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(lanes_.CheckErrors().ok());
  EXPECT_THAT(nccl_.TakeCalls(), IsEmpty());
}

TEST_F(NcclLanesTest, ExchangeBeforeOpenIsRefused) {
  EXPECT_EQ(Exchange(0).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(lanes_.CheckErrors().ok());
}

TEST_F(NcclLanesTest, LostPeerIsUnavailable) {
  OpenWell();
  nccl_.Answer(/*in_progress=*/0, ncclRemoteError);
  const absl::Status status = lanes_.CheckErrors();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
}

}  // namespace
}  // namespace epserve::runtime
