#include "server/worker/control_proto_convert.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace epserve::worker {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

void ExpectInvalid(v1::CoordinatorMessage message, const std::string& text) {
  const auto converted = FromProto(message);
  EXPECT_EQ(converted.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(converted.status().message()), HasSubstr(text));
}

TEST(FromProtoTest, ShardIsTakenWholeAndItsBytesAreMoved) {
  v1::CoordinatorMessage message;
  v1::Shard& proto = *message.mutable_shard();
  proto.set_epoch(7);
  proto.set_batch(8);
  proto.set_slot(1);
  proto.set_layer(3);
  proto.set_row_type(v1::ROW_TYPE_BF16);
  proto.set_num_tokens(2);
  proto.set_topk(4);
  proto.set_hidden(std::string(1000, 'h'));
  proto.set_routed(true);
  proto.set_topk_ids(std::string(100, 'i'));
  proto.set_topk_weights(std::string(100, 'w'));
  proto.set_trigger(v1::TRIGGER_SEPARATE);
  for (const int rows : {1, 2, 3, 4}) proto.mutable_counts()->add_rows(rows);
  proto.mutable_counts()->add_rows_per_expert(9);
  const char* const bytes = proto.hidden().data();

  auto converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  const Shard& shard = std::get<Shard>(*converted);
  EXPECT_EQ(shard.epoch, 7u);
  EXPECT_EQ(shard.batch, 8u);
  EXPECT_EQ(shard.slot, 1);
  EXPECT_EQ(shard.layer, 3);
  EXPECT_EQ(shard.dtype, runtime::DataType::kBf16);
  EXPECT_EQ(shard.num_tokens, 2);
  EXPECT_EQ(shard.topk, 4);
  EXPECT_TRUE(shard.routed);
  EXPECT_TRUE(shard.separate_triggers);
  EXPECT_EQ(shard.hidden.data(), bytes);
  EXPECT_EQ(shard.topk_ids, std::string(100, 'i'));
  EXPECT_EQ(shard.topk_weights, std::string(100, 'w'));
  ASSERT_TRUE(shard.counts.has_value());
  EXPECT_EQ(shard.counts->num_ranks, 2);
  EXPECT_EQ(shard.counts->at(1, 0), 3);
  EXPECT_THAT(shard.counts->rows_per_expert, ElementsAre(9));
}

TEST(FromProtoTest, ShardSaysWhetherTheRanksExchangeItsCounts) {
  v1::CoordinatorMessage message;
  message.mutable_shard()->set_row_type(v1::ROW_TYPE_FP32);
  auto converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_FALSE(std::get<Shard>(*converted).device_counts);
  message.mutable_shard()->set_row_type(v1::ROW_TYPE_FP32);
  message.mutable_shard()->set_device_counts(true);
  converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_TRUE(std::get<Shard>(*converted).device_counts);
  EXPECT_FALSE(std::get<Shard>(*converted).counts.has_value());
}

TEST(FromProtoTest, SharedBatchIsTakenAndItsReaderSaysThatItTakesSuch) {
  v1::CoordinatorMessage message;
  v1::Shard& proto = *message.mutable_shard();
  proto.set_row_type(v1::ROW_TYPE_FP32);
  for (const std::int64_t begin : {0, 3, 3, 5}) proto.add_shard_begin(begin);
  proto.set_row_block(4);
  proto.set_rows_follow(true);
  const auto converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_THAT(std::get<Shard>(*converted).shard_begin, ElementsAre(0, 3, 3, 5));
  EXPECT_EQ(std::get<Shard>(*converted).row_block, 4);
  EXPECT_TRUE(std::get<Shard>(*converted).rows_follow);
  EXPECT_TRUE(
      ToProto(HeapCreated{.takes_shared_batches = true}).heap_created().takes_shared_batches());
  EXPECT_FALSE(ToProto(HeapCreated{}).heap_created().takes_shared_batches());
}

TEST(FromProtoTest, RowsInRegionsAndRegionsGoneAreTakenWhole) {
  v1::CoordinatorMessage message;
  v1::Shard& proto = *message.mutable_shard();
  proto.set_row_type(v1::ROW_TYPE_FP32);
  v1::RegionRows& source = *proto.add_sources();
  source.set_region(5);
  source.set_label("'in'");
  source.set_object_offset(std::uint64_t{1} << 40);
  source.set_first_row(2);
  source.set_num_rows(3);
  proto.add_targets()->set_region(6);
  auto converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  const Shard& shard = std::get<Shard>(*converted);
  ASSERT_EQ(shard.sources.size(), 1u);
  EXPECT_EQ(shard.sources[0].region, 5u);
  EXPECT_EQ(shard.sources[0].label, "'in'");
  EXPECT_EQ(shard.sources[0].object_offset, std::uint64_t{1} << 40);
  EXPECT_EQ(shard.sources[0].first_row, 2);
  EXPECT_EQ(shard.sources[0].num_rows, 3);
  ASSERT_EQ(shard.targets.size(), 1u);
  EXPECT_EQ(shard.targets[0].region, 6u);

  message.mutable_forget_regions()->add_regions(7);
  converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_THAT(std::get<ForgetRegions>(*converted).regions, ElementsAre(7));

  message.mutable_create_heap()->set_region_socket("/there");
  message.mutable_create_heap()->set_region_secret("secret");
  converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_EQ(std::get<CreateHeap>(*converted).region_socket, "/there");
  EXPECT_EQ(std::get<CreateHeap>(*converted).region_secret, "secret");
}

TEST(FromProtoTest, DeviceRegionsAndRowsAreTakenOver) {
  v1::CoordinatorMessage message;
  v1::DeviceRegion& region = *message.mutable_create_heap()->add_device_regions();
  region.set_region(7);
  region.set_label("'gpu'");
  region.set_handle("handle");
  region.set_device_id(3);
  region.set_size_bytes(4096);
  auto converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  const DeviceRegionInfo info = std::get<CreateHeap>(*converted).device_regions.at(0);
  EXPECT_EQ(info.region, 7u);
  EXPECT_EQ(info.label, "'gpu'");
  EXPECT_EQ(info.handle, "handle");
  EXPECT_EQ(info.device_id, 3);
  EXPECT_EQ(info.size_bytes, 4096u);

  v1::Shard& shard = *message.mutable_shard();
  shard.set_row_type(v1::ROW_TYPE_BF16);
  v1::DeviceRows& rows = *shard.add_device_rows();
  rows.set_first_row(1);
  rows.set_num_rows(2);
  rows.set_request_row(30);
  rows.mutable_topk_weights()->set_region(7);
  rows.mutable_topk_weights()->set_offset(64);
  rows.mutable_output()->set_region(8);
  rows.set_wide_ids(true);
  converted = FromProto(message);
  ASSERT_TRUE(converted.ok()) << converted.status();
  const DeviceRows taken = std::get<Shard>(*converted).device_rows.at(0);
  EXPECT_EQ(taken.first_row, 1);
  EXPECT_EQ(taken.num_rows, 2);
  EXPECT_EQ(taken.request_row, 30);
  EXPECT_FALSE(taken.hidden.has_value());
  EXPECT_FALSE(taken.topk_ids.has_value());
  EXPECT_EQ(taken.topk_weights->region, 7u);
  EXPECT_EQ(taken.topk_weights->offset_bytes, 64u);
  EXPECT_EQ(taken.output->region, 8u);
  EXPECT_TRUE(taken.wide_ids);
}

TEST(ToProtoTest, RegionFaultsAreToldAndNeverWithoutAMessage) {
  BatchDone done{.epoch = 7, .batch = 8};
  done.region_faults = {{2, absl::InvalidArgumentError("truncated")}, {5, absl::InternalError("")}};
  const v1::WorkerMessage message = ToProto(std::move(done));
  ASSERT_EQ(message.batch_done().region_faults_size(), 2);
  EXPECT_EQ(message.batch_done().code(), 0);
  EXPECT_EQ(message.batch_done().region_faults(0).first_row(), 2);
  EXPECT_EQ(message.batch_done().region_faults(0).code(), 3);
  EXPECT_EQ(message.batch_done().region_faults(0).message(), "truncated");
  EXPECT_EQ(message.batch_done().region_faults(1).message(), "INTERNAL");
}

TEST(FromProtoTest, ShardWithoutATypeIsRefused) {
  v1::CoordinatorMessage message;
  message.mutable_shard()->set_epoch(7);
  ExpectInvalid(message, "row_type 0");
}

TEST(FromProtoTest, CountMatrixThatIsNoSquareIsRefused) {
  v1::CoordinatorMessage message;
  for (int i = 0; i < 3; ++i) message.mutable_count_matrix()->add_rows(i);
  ExpectInvalid(message, "3 entries");
}

TEST(FromProtoTest, AssignmentThatIsNoPlacementIsRefused) {
  v1::CoordinatorMessage message;
  v1::Assignment& assignment = *message.mutable_assignment();
  assignment.set_num_ranks(2);
  ExpectInvalid(message, "first_expert has 0 entries");
  for (const int first : {0, 5, 4}) assignment.add_first_expert(first);
  ExpectInvalid(message, "does not ascend");
  assignment.set_first_expert(2, 8);
  assignment.set_rank(2);
  ExpectInvalid(message, "rank 2");
  assignment.set_rank(1);
  EXPECT_TRUE(FromProto(message).ok());
}

TEST(FromProtoTest, UnknownKindIsUnimplemented) {
  v1::CoordinatorMessage message;
  EXPECT_EQ(FromProto(message).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(FromProtoTest, RejectionIsNeverOk) {
  v1::CoordinatorMessage message;
  message.mutable_rejected()->set_message("no");
  auto converted = FromProto(message);
  ASSERT_TRUE(converted.ok());
  EXPECT_FALSE(std::get<Rejected>(*converted).status.ok());
}

TEST(ToProtoTest, FailedBatchNeverHasAnEmptyMessage) {
  const v1::WorkerMessage message =
      ToProto(BatchDone{.epoch = 7, .batch = 8, .status = absl::AbortedError("")});
  EXPECT_EQ(message.batch_done().code(), static_cast<int>(absl::StatusCode::kAborted));
  EXPECT_EQ(message.batch_done().message(), "ABORTED");
}

TEST(ToProtoTest, HelloCarriesTheModel) {
  Hello hello{.worker_id = "w", .incarnation = "i", .held_rank = 2, .held_num_ranks = 4};
  hello.model.layers = {1, 2};
  hello.model.num_experts = 64;
  hello.last_epoch = 9;
  EXPECT_FALSE(ToProto(hello).hello().device_counts());
  hello.device_counts = true;
  const v1::WorkerMessage message = ToProto(hello);
  EXPECT_TRUE(message.hello().device_counts());
  EXPECT_EQ(message.hello().held_rank(), 2);
  EXPECT_EQ(message.hello().held_num_ranks(), 4);
  EXPECT_EQ(message.hello().last_epoch(), 9u);
  EXPECT_EQ(message.hello().model().num_experts(), 64);
  EXPECT_THAT(message.hello().model().layers(), ElementsAre(1, 2));
}

TEST(ToProtoTest, CountsAndOutputAreTakenWhole) {
  const v1::WorkerMessage counts = ToProto(CountsReport{
      .epoch = 7, .batch = 8, .counts = {.rows_to_rank = {1, 2}, .rows_per_expert = {3}}});
  EXPECT_THAT(counts.counts().rows_to_rank(), ElementsAre(1, 2));
  EXPECT_THAT(counts.counts().rows_per_expert(), ElementsAre(3));
  const v1::WorkerMessage done =
      ToProto(BatchDone{.epoch = 7, .batch = 8, .output = "rows", .local_expert_rows = {4, 5}});
  EXPECT_EQ(done.batch_done().output(), "rows");
  EXPECT_THAT(done.batch_done().local_expert_rows(), ElementsAre(4, 5));
}

}  // namespace
}  // namespace epserve::worker
