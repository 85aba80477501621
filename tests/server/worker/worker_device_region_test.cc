// The daemon opens and closes clients' CUDA memory as the coordinator says, and loses it with the
// epoch.
#include <gmock/gmock.h>

#include "tests/server/worker/worker_harness.h"

namespace epserve::worker {
namespace {

class WorkerDeviceRegionTest : public WorkerTest {
 protected:
  void SetUp() override {
    memory_.Share("handle", &bytes_);
    engine_->set_device_regions(&memory_);
  }

  static void Fill(v1::DeviceRegion* region, std::uint64_t id, const std::string& handle) {
    region->set_region(id);
    region->set_label("'gpu'");
    region->set_handle(handle);
    region->set_size_bytes(64);
  }
  static v1::CoordinatorMessage Open(std::uint64_t id, const std::string& handle) {
    v1::CoordinatorMessage message;
    Fill(message.mutable_open_device_region()->mutable_region(), id, handle);
    return message;
  }

  std::string bytes_ = std::string(64, 'x');
  FakeDeviceRegions memory_;
};

TEST_F(WorkerDeviceRegionTest, RegionIsOpenedAndClosedOnRequestAndAnErrorTellsWhy) {
  const auto session = Serve(7);
  session->Send(Open(1, "handle"));
  v1::WorkerMessage opened = session->Next();
  ASSERT_TRUE(opened.has_device_region_opened());
  EXPECT_EQ(opened.device_region_opened().region(), 1u);
  EXPECT_EQ(opened.device_region_opened().code(), 0);
  EXPECT_EQ(memory_.num_open(), 1);
  session->Send(Open(2, "stale"));
  opened = session->Next();
  EXPECT_EQ(opened.device_region_opened().region(), 2u);
  EXPECT_EQ(opened.device_region_opened().code(), 9);
  EXPECT_THAT(opened.device_region_opened().message(), testing::HasSubstr("stale"));
  v1::CoordinatorMessage close;
  close.mutable_close_device_regions()->add_regions(1);
  close.mutable_close_device_regions()->add_regions(2);
  session->Send(close);
  const v1::WorkerMessage closed = session->Next();
  ASSERT_TRUE(closed.has_device_regions_closed());
  EXPECT_THAT(closed.device_regions_closed().regions(), testing::ElementsAre(1, 2));
  EXPECT_EQ(memory_.num_open(), 0);
}

TEST_F(WorkerDeviceRegionTest, RegionsComeWithTheHeapAndGoWithTheEpoch) {
  StartCoordinator();
  StartWorker();
  const auto session = GreetAndLoad();
  v1::CoordinatorMessage create = CreateHeapMessage(7);
  Fill(create.mutable_create_heap()->add_device_regions(), 1, "handle");
  Fill(create.mutable_create_heap()->add_device_regions(), 2, "stale");
  session->Send(create);
  const v1::WorkerMessage created = session->Next();
  ASSERT_TRUE(created.has_heap_created());
  ASSERT_EQ(created.heap_created().refused_regions_size(), 1);
  EXPECT_EQ(created.heap_created().refused_regions(0).region(), 2u);
  EXPECT_EQ(memory_.num_open(), 1);
  session->Send(EpochEndedMessage(7));
  EXPECT_TRUE(session->Next().has_epoch_quiesced());
  EXPECT_EQ(memory_.num_open(), 0);
  session->Send(Open(3, "handle"));
  EXPECT_EQ(session->Next().device_region_opened().code(), 14) << "no epoch is open";
}

TEST_F(WorkerDeviceRegionTest, StreamThatBreaksClosesEverything) {
  const auto session = Serve(7);
  session->Send(Open(1, "handle"));
  ASSERT_TRUE(session->Next().has_device_region_opened());
  session->Break();
  Greet();
  EXPECT_EQ(memory_.num_open(), 0);
}

}  // namespace
}  // namespace epserve::worker
