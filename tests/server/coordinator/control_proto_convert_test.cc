// What of device regions travels on the control stream, as the coordinator writes and reads it.
#include "server/coordinator/control_proto_convert.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

namespace epserve::coordinator {
namespace {

DeviceRegionInfo Region() { return {7, "'gpu'", std::string(64, 'h'), 3, 4096}; }

void ExpectRegion(const v1::DeviceRegion& region) {
  EXPECT_EQ(region.region(), 7u);
  EXPECT_EQ(region.label(), "'gpu'");
  EXPECT_EQ(region.handle(), std::string(64, 'h'));
  EXPECT_EQ(region.device_id(), 3);
  EXPECT_EQ(region.size_bytes(), 4096u);
}

TEST(ControlProtoConvertTest, DeviceRegionsAreOpenedWithAHeapOrByThemselvesAndClosed) {
  CreateHeapMessage heap;
  heap.device_regions = {Region()};
  const v1::CoordinatorMessage create = ToProto(std::move(heap));
  ASSERT_EQ(create.create_heap().device_regions_size(), 1);
  ExpectRegion(create.create_heap().device_regions(0));
  ExpectRegion(ToProto(OpenDeviceRegionMessage{Region()}).open_device_region().region());
  const v1::CoordinatorMessage close = ToProto(CloseDeviceRegionsMessage{{7, 8}});
  EXPECT_THAT(close.close_device_regions().regions(), testing::ElementsAre(7, 8));
}

TEST(ControlProtoConvertTest, HeapsHandleTypeIsTakenAsTheWorkerSaysIt) {
  v1::WorkerMessage created;
  created.mutable_heap_created()->set_handle("bytes");
  created.mutable_heap_created()->set_handle_type("fabric");
  const auto report = FromProto(11, created);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->handle_type, "fabric");
  EXPECT_EQ(std::get<HeapCreated>(report->event).handle, "bytes");
}

TEST(ControlProtoConvertTest, SharedBatchesAreOfferedByTheWorkerAndToldWithTheShard) {
  v1::WorkerMessage created;
  created.mutable_heap_created()->set_takes_shared_batches(true);
  const auto report = FromProto(11, created);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->takes_shared_batches);
  EXPECT_FALSE(report->regions_reachable);
  ShardMessage shard;
  shard.shard_begin = {0, 3, 3, 5};
  shard.row_block = 4;
  shard.rows_follow = true;
  const v1::CoordinatorMessage message = ToProto(std::move(shard));
  EXPECT_THAT(message.shard().shard_begin(), testing::ElementsAre(0, 3, 3, 5));
  EXPECT_EQ(message.shard().row_block(), 4);
  EXPECT_TRUE(message.shard().rows_follow());
}

TEST(ControlProtoConvertTest, DeviceRowsTellTheirPlacesAndOnlyThose) {
  ShardMessage shard;
  DeviceRows rows;
  rows.first_row = 1;
  rows.num_rows = 2;
  rows.request_row = 30;
  rows.hidden = server::DevicePlace{7, 100};
  rows.topk_ids = server::DevicePlace{8, 200};
  rows.wide_ids = true;
  shard.device_rows = {rows};
  const v1::CoordinatorMessage message = ToProto(std::move(shard));
  ASSERT_EQ(message.shard().device_rows_size(), 1);
  const v1::DeviceRows& told = message.shard().device_rows(0);
  EXPECT_EQ(told.first_row(), 1);
  EXPECT_EQ(told.num_rows(), 2);
  EXPECT_EQ(told.request_row(), 30);
  EXPECT_EQ(told.hidden().region(), 7u);
  EXPECT_EQ(told.hidden().offset(), 100u);
  EXPECT_EQ(told.topk_ids().offset(), 200u);
  EXPECT_FALSE(told.has_topk_weights());
  EXPECT_FALSE(told.has_output());
  EXPECT_TRUE(told.wide_ids());
}

TEST(ControlProtoConvertTest, WorkersAnswersAreReadAndNoErrorIsWithoutAMessage) {
  v1::WorkerMessage opened;
  opened.mutable_device_region_opened()->set_region(7);
  const auto open = FromProto(11, opened);
  ASSERT_TRUE(open.ok());
  EXPECT_EQ(open->answer->stream, 11u);
  EXPECT_EQ(open->answer->opened->region, 7u);
  EXPECT_TRUE(open->answer->opened->status.ok());

  opened.mutable_device_region_opened()->set_code(9);
  const auto refused = FromProto(11, opened);
  ASSERT_TRUE(refused.ok());
  EXPECT_EQ(refused->answer->opened->status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(refused->answer->opened->status.message(), "");

  v1::WorkerMessage closed;
  closed.mutable_device_regions_closed()->add_regions(7);
  const auto close = FromProto(11, closed);
  ASSERT_TRUE(close.ok());
  EXPECT_FALSE(close->answer->opened.has_value());
  EXPECT_THAT(close->answer->closed, testing::ElementsAre(7));

  v1::WorkerMessage heap;
  auto* of_heap = heap.mutable_heap_created()->add_refused_regions();
  of_heap->set_region(7);
  of_heap->set_code(3);
  of_heap->set_message("too long");
  const auto created = FromProto(11, heap);
  ASSERT_TRUE(created.ok());
  EXPECT_FALSE(created->answer.has_value());
  ASSERT_EQ(created->refused.size(), 1u);
  EXPECT_EQ(created->refused[0].status, absl::InvalidArgumentError("too long"));
}

}  // namespace
}  // namespace epserve::coordinator
