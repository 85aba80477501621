#include "server/coordinator/device_regions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

struct Sent {
  StreamId stream;
  StreamMessage message;
};

class FakeActions : public DeviceRegionActions {
 public:
  void SendTo(StreamId stream, StreamMessage message) override {
    sent.push_back({stream, std::move(message)});
  }
  void HoldBatches(bool hold) override { holds.push_back(hold); }
  void HoldBatchesToTheirEnd() override {
    holds.push_back(true);
    ++holds_to_their_end;
  }
  std::string NameOf(StreamId stream) const override { return absl::StrCat("rank ", stream - 10); }

  std::vector<Sent> sent;
  std::vector<bool> holds;
  int holds_to_their_end = 0;
};

class DeviceRegionsTest : public testing::Test {
 protected:
  // Workers 10 and 11 serve in epoch 5.
  void SetUp() override {
    EXPECT_THAT(Ids(regions_.JoinEpoch(5, 10)), IsEmpty());
    EXPECT_THAT(Ids(regions_.JoinEpoch(5, 11)), IsEmpty());
    regions_.SetServing(true);
  }

  static std::shared_ptr<const ShmRegion> MakeRegion(std::uint64_t id) {
    ShmRegionInfo info;
    info.id = id;
    info.name = absl::StrCat("r", id);
    info.kind = ShmKind::kCuda;
    info.handle = std::string(64, 'h');
    info.device_id = 3;
    info.size_bytes = 4096;
    return std::make_shared<ShmRegion>(info, runtime::UniqueFd());
  }
  static std::vector<std::uint64_t> Ids(const std::vector<DeviceRegionInfo>& infos) {
    std::vector<std::uint64_t> ids;
    for (const DeviceRegionInfo& info : infos) ids.push_back(info.region);
    return ids;
  }
  static DeviceRegionAnswer Opened(StreamId stream, std::uint64_t id,
                                   absl::Status status = absl::OkStatus()) {
    return {stream, DeviceRegionState{id, std::move(status)}, {}};
  }
  static DeviceRegionAnswer Closed(StreamId stream, std::vector<std::uint64_t> ids) {
    return {stream, std::nullopt, std::move(ids)};
  }
  // Where messages of that kind have gone since the last look.
  template <typename Message>
  std::vector<StreamId> TakeSent() {
    std::vector<StreamId> streams;
    for (const Sent& sent : actions_.sent) {
      if (std::holds_alternative<Message>(sent.message)) streams.push_back(sent.stream);
    }
    EXPECT_EQ(streams.size(), actions_.sent.size()) << "something else was sent, too";
    actions_.sent.clear();
    return streams;
  }
  DeviceRegions::Done Into(std::vector<absl::Status>& answers) {
    return [&answers](const absl::Status& status) { answers.push_back(status); };
  }
  // Opened by both.
  std::shared_ptr<const ShmRegion> OpenEverywhere(std::uint64_t id) {
    std::shared_ptr<const ShmRegion> region = MakeRegion(id);
    std::vector<absl::Status> answers;
    regions_.Open(region, Into(answers));
    regions_.OnBatchesHeld();
    regions_.OnAnswer(Opened(10, id));
    regions_.OnAnswer(Opened(11, id));
    EXPECT_EQ(answers.size(), 1u);
    EXPECT_TRUE(answers.at(0).ok()) << answers.at(0);
    actions_.sent.clear();
    actions_.holds.clear();
    return region;
  }
  static ValidatedRequest RequestIn(const std::shared_ptr<const ShmRegion>& region) {
    ValidatedRequest request;
    request.ids_source.region = region;
    return request;
  }

  FakeActions actions_;
  DeviceRegions regions_{&actions_};
  std::vector<absl::Status> answers_;
};

TEST_F(DeviceRegionsTest, OpenAnswersOnceEveryWorkerHasOpenedItWhileBatchesAreHeld) {
  const auto region = MakeRegion(1);
  regions_.Open(region, Into(answers_));
  EXPECT_THAT(actions_.holds, ElementsAre(true));
  EXPECT_THAT(actions_.sent, IsEmpty()) << "batches may be in flight";
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<OpenDeviceRegionMessage>(), ElementsAre(10, 11));
  regions_.OnAnswer(Opened(11, 1));
  EXPECT_THAT(answers_, IsEmpty());
  EXPECT_THAT(actions_.holds, ElementsAre(true));
  regions_.OnAnswer(Opened(10, 1));
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_TRUE(answers_[0].ok());
  EXPECT_THAT(actions_.holds, ElementsAre(true, false));
}

TEST_F(DeviceRegionsTest, RegionThatOneWorkerRefusesIsClosedAtTheOthersBeforeTheAnswer) {
  regions_.Open(MakeRegion(1), Into(answers_));
  regions_.OnBatchesHeld();
  TakeSent<OpenDeviceRegionMessage>();
  regions_.OnAnswer(Opened(11, 1, absl::FailedPreconditionError("no such GPU; show it one")));
  regions_.OnAnswer(Opened(10, 1));
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10));
  EXPECT_THAT(answers_, IsEmpty());
  regions_.OnAnswer(Closed(10, {1}));
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_EQ(answers_[0].code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(answers_[0].message()), HasSubstr("region 'r1' is not open at rank 1: "));
  EXPECT_THAT(std::string(answers_[0].message()), HasSubstr("no such GPU"));
  EXPECT_THAT(actions_.holds, ElementsAre(true, false));
}

TEST_F(DeviceRegionsTest, OpenWhileTheServiceDoesNotServeIsUnavailable) {
  regions_.SetServing(false);
  regions_.Open(MakeRegion(1), Into(answers_));
  regions_.OnBatchesHeld();
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_EQ(answers_[0].code(), StatusCode::kUnavailable);
  EXPECT_THAT(actions_.sent, IsEmpty());
  EXPECT_THAT(actions_.holds, ElementsAre(true, false));
}

TEST_F(DeviceRegionsTest, WorkerThatIsLostWhileARegionOpensMakesItUnavailableAndItIsClosed) {
  regions_.Open(MakeRegion(1), Into(answers_));
  regions_.OnBatchesHeld();
  TakeSent<OpenDeviceRegionMessage>();
  regions_.OnAnswer(Opened(10, 1));
  regions_.Leave(11);
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10));
  regions_.Leave(10);
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_EQ(answers_[0].code(), StatusCode::kUnavailable);
  EXPECT_THAT(std::string(answers_[0].message()), HasSubstr("rank 1 was lost"));
  EXPECT_THAT(Ids(regions_.JoinEpoch(6, 12)), IsEmpty()) << "nobody is to open it any more";
}

TEST_F(DeviceRegionsTest, WorkersOfALaterEpochGetTheListAndWhatTheyRefuseIsOfNoUseThere) {
  const auto one = OpenEverywhere(1);
  const auto two = OpenEverywhere(2);
  regions_.SetServing(false);
  regions_.Leave(10);
  regions_.Leave(11);
  EXPECT_THAT(Ids(regions_.JoinEpoch(6, 10)), ElementsAre(1, 2));
  EXPECT_THAT(Ids(regions_.JoinEpoch(6, 12)), ElementsAre(1, 2));
  regions_.OnRefused(6, 12, {{2, absl::FailedPreconditionError("stale")}});
  regions_.SetServing(true);
  EXPECT_TRUE(regions_.CheckUsable(RequestIn(one)).ok());
  const absl::Status unusable = regions_.CheckUsable(RequestIn(two));
  EXPECT_EQ(unusable.code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(unusable.message()),
              HasSubstr("region 'r2' is not open at rank 2: stale"));
  // And where all have it again, it is of use again.
  EXPECT_THAT(Ids(regions_.JoinEpoch(7, 10)), ElementsAre(1, 2));
  EXPECT_THAT(Ids(regions_.JoinEpoch(7, 13)), ElementsAre(1, 2));
  EXPECT_TRUE(regions_.CheckUsable(RequestIn(two)).ok());
}

TEST_F(DeviceRegionsTest, RefusalOfAnEpochThatIsOverChangesNothing) {
  const auto one = OpenEverywhere(1);
  regions_.JoinEpoch(6, 10);
  regions_.OnRefused(5, 10, {{1, absl::InternalError("late")}});
  EXPECT_TRUE(regions_.CheckUsable(RequestIn(one)).ok());
}

TEST_F(DeviceRegionsTest, CloseAsksThoseThatHaveTheRegionAndAnswersOnceNoneHas) {
  auto one = OpenEverywhere(1);
  one = nullptr;
  regions_.Close({1, 99}, Into(answers_));
  EXPECT_THAT(actions_.sent, IsEmpty());
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10, 11));
  regions_.OnAnswer(Closed(10, {1}));
  EXPECT_THAT(answers_, IsEmpty());
  regions_.Leave(11);
  ASSERT_EQ(answers_.size(), 1u) << "a worker that is gone has nothing open";
  EXPECT_TRUE(answers_[0].ok());
}

TEST_F(DeviceRegionsTest, OperationsTakeTurnsUnderAHoldThatIsAskedForAnew) {
  regions_.Open(MakeRegion(1), Into(answers_));
  regions_.Open(MakeRegion(2), Into(answers_));
  regions_.OnBatchesHeld();
  regions_.OnAnswer(Opened(10, 1));
  regions_.OnAnswer(Opened(11, 1));
  EXPECT_EQ(answers_.size(), 1u);
  EXPECT_THAT(actions_.holds, ElementsAre(true, false, true)) << "batches are let go in between";
  actions_.sent.clear();
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<OpenDeviceRegionMessage>(), ElementsAre(10, 11));
}

TEST_F(DeviceRegionsTest, WorkerThatDoesNotAnswerInTimeFailsTheOpeningAndIsToldToCloseIt) {
  regions_.Open(MakeRegion(1), Into(answers_));
  regions_.OnBatchesHeld();
  TakeSent<OpenDeviceRegionMessage>();
  regions_.OnAnswer(Opened(10, 1));
  regions_.OnHoldExpired();
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_EQ(answers_[0].code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(answers_[0].message()), HasSubstr("rank 1 did not answer"));
  EXPECT_THAT(actions_.holds, ElementsAre(true, false, true));
  regions_.OnAnswer(Opened(11, 1)) /* late */;
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10, 11));
}

TEST_F(DeviceRegionsTest, CloseThatCouldNotHoldBatchesIsMadeUpForAfterThoseThatWait) {
  auto one = OpenEverywhere(1);
  one = nullptr;
  regions_.Close({1}, Into(answers_));
  regions_.Open(MakeRegion(2), Into(answers_));
  regions_.OnHoldExpired();
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_EQ(answers_[0].code(), StatusCode::kDeadlineExceeded);
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<OpenDeviceRegionMessage>(), ElementsAre(10, 11));
  regions_.OnAnswer(Opened(10, 2));
  regions_.OnAnswer(Opened(11, 2));
  ASSERT_EQ(answers_.size(), 2u);
  EXPECT_EQ(actions_.holds_to_their_end, 1) << "nobody waits for it";
  regions_.OnHoldExpired();  // As after a stall of the host.
  EXPECT_EQ(actions_.holds_to_their_end, 2);
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10, 11));
  regions_.OnAnswer(Closed(10, {1}));
  regions_.OnAnswer(Closed(11, {1}));
  EXPECT_EQ(answers_.size(), 2u);
  actions_.holds.clear();
  regions_.OnBatchesHeld();
  EXPECT_THAT(actions_.sent, IsEmpty());
  EXPECT_THAT(actions_.holds, IsEmpty()) << "nothing is left to do";
}

TEST_F(DeviceRegionsTest, CloseThatIsAskedForAgainAnswersOnceNobodyHasTheRegion) {
  auto one = OpenEverywhere(1);
  one = nullptr;
  regions_.Close({1}, Into(answers_));
  regions_.OnHoldExpired();
  regions_.Close({}, Into(answers_));  // The name is gone.
  EXPECT_EQ(answers_.size(), 1u);
  regions_.OnHoldExpired();
  EXPECT_EQ(answers_.size(), 1u) << "that was the one that follows by itself";
  regions_.OnHoldExpired();
  ASSERT_EQ(answers_.size(), 2u);
  EXPECT_EQ(answers_[1].code(), StatusCode::kDeadlineExceeded);
  regions_.Close({}, Into(answers_));
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10, 11));
  regions_.OnAnswer(Closed(10, {1}));
  regions_.OnAnswer(Closed(11, {1}));
  regions_.OnBatchesHeld();
  ASSERT_EQ(answers_.size(), 3u);
  EXPECT_TRUE(answers_[2].ok());
  EXPECT_THAT(actions_.sent, IsEmpty());
  actions_.holds.clear();
  regions_.Close({}, Into(answers_));
  ASSERT_EQ(answers_.size(), 4u) << "there is nothing to wait for";
  EXPECT_TRUE(answers_[3].ok());
  EXPECT_THAT(actions_.holds, IsEmpty());
}

TEST_F(DeviceRegionsTest, WorkerThatDoesNotAnswerAClosingIsAskedAgainByTheNextAlone) {
  auto one = OpenEverywhere(1);
  auto two = OpenEverywhere(2);
  one = two = nullptr;
  regions_.Close({1}, Into(answers_));
  regions_.OnBatchesHeld();
  TakeSent<CloseDeviceRegionsMessage>();
  regions_.OnAnswer(Closed(10, {1}));
  regions_.OnHoldExpired();
  ASSERT_EQ(answers_.size(), 1u);
  EXPECT_THAT(std::string(answers_[0].message()), HasSubstr("rank 1 did not answer"));
  EXPECT_THAT(actions_.holds, ElementsAre(true, false)) << "it has been told";
  regions_.Close({2}, Into(answers_));
  regions_.OnBatchesHeld();
  EXPECT_THAT(TakeSent<CloseDeviceRegionsMessage>(), ElementsAre(10, 11));
  regions_.OnAnswer(Closed(10, {2}));
  regions_.OnAnswer(Closed(11, {1})) /* late */;
  EXPECT_EQ(answers_.size(), 1u) << "rank 1 still has the second one";
  regions_.OnAnswer(Closed(11, {2, 1}));
  ASSERT_EQ(answers_.size(), 2u);
  EXPECT_TRUE(answers_[1].ok());
}

TEST_F(DeviceRegionsTest, StopAnswersWhatIsLeft) {
  regions_.Open(MakeRegion(1), Into(answers_));
  regions_.Close({7}, Into(answers_));
  regions_.Stop(absl::UnavailableError("over"));
  ASSERT_EQ(answers_.size(), 2u);
  EXPECT_EQ(answers_[1].code(), StatusCode::kUnavailable);
}

}  // namespace
}  // namespace epserve::coordinator
