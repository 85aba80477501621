#include "server/coordinator/front_door/request_validation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/server/coordinator/front_door/request_validation_fixture.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;
using runtime::DataType;
using testing::ElementsAre;
using testing::HasSubstr;

TEST_F(RequestValidationTest, ValidRequestComesThroughWithItsValues) {
  const TestRequest request = ValidRequest();
  const RequestView view = request.View();
  const auto result = ValidateRequest(view, model_, RequestLimits(), regions_);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layer, 3) << "the first layer is the default";
  EXPECT_EQ(result->dtype, DataType::kFp32);
  EXPECT_EQ(result->num_tokens, 3);
  EXPECT_EQ(result->topk, 2);
  EXPECT_TRUE(result->routed);
  EXPECT_THAT(result->topk_ids, ElementsAre(0, 7, -1, 3, 5, 5));
  EXPECT_THAT(result->topk_weights, ElementsAre(0.5f, 0.5f, 1, 0, 0.25f, 0.75f));
  EXPECT_EQ(result->output_bytes, 48u);
  EXPECT_EQ(result->output.region, nullptr);
  EXPECT_EQ(result->timeout_us, 0);
  EXPECT_EQ(result->hidden.data(), view.raw_contents[0].pieces()[0].data())
      << "hidden states are not copied";
  EXPECT_EQ(result->hidden.size(), 48u);
}

TEST_F(RequestValidationTest, InputsMayComeInAnyOrder) {
  TestRequest request = ValidRequest();
  std::swap(request.inputs[0], request.inputs[2]);
  std::swap(request.raw[0], request.raw[2]);
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->hidden.size(), 48u);
  EXPECT_EQ(result->topk_weights[5], 0.75f);
}

TEST_F(RequestValidationTest, Int64IdsAreNarrowed) {
  TestRequest request = ValidRequest();
  request.inputs[1].datatype = "INT64";
  request.raw[1] = BytesOf(std::vector<std::int64_t>{-1, 7, 6, 5, 4, 0});
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->topk_ids, ElementsAre(-1, 7, 6, 5, 4, 0));
}

TEST_F(RequestValidationTest, HalfTypesAreAccepted) {
  for (const auto& [name, type] :
       {std::pair("BF16", DataType::kBf16), std::pair("FP16", DataType::kFp16)}) {
    TestRequest request = ValidRequest();
    request.inputs[0].datatype = name;
    request.raw[0] = std::string(24, 'h');
    const auto result = Validate(request);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->dtype, type);
    EXPECT_EQ(result->output_bytes, 24u);
  }
}

TEST_F(RequestValidationTest, TypedContentsAreAccepted) {
  TestRequest request = ValidRequest();
  const TypedKind kinds[] = {TypedKind::kFp32, TypedKind::kInt32, TypedKind::kFp32};
  for (int i = 0; i < 3; ++i) {
    request.inputs[i].typed_kind = kinds[i];
    request.inputs[i].typed_bytes = request.raw[i];
  }
  request.raw.clear();
  auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->topk_ids, ElementsAre(0, 7, -1, 3, 5, 5));

  request.inputs[1].datatype = "INT64";
  request.inputs[1].typed_kind = TypedKind::kInt64;
  request.inputs[1].typed_bytes = BytesOf(std::vector<std::int64_t>{1, 2, 3, 4, 5, 6});
  result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->topk_ids, ElementsAre(1, 2, 3, 4, 5, 6));
}

TEST_F(RequestValidationTest, TypedContentsInPiecesAreTakenWhereTheyAre) {
  TestRequest request = ValidRequest();
  const TypedKind kinds[] = {TypedKind::kFp32, TypedKind::kInt32, TypedKind::kFp32};
  RequestView view = request.View();
  view.raw_contents.clear();
  for (std::size_t i = 0; i < 3; ++i) {
    const std::string_view bytes = request.raw[i];
    view.inputs[i].typed_kind = kinds[i];
    view.inputs[i].typed_bytes = RawView(bytes.substr(0, 5));
    view.inputs[i].typed_bytes.Append({bytes.data() + 5, bytes.size() - 5});
  }
  const auto result = ValidateRequest(view, model_, RequestLimits(), regions_);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->hidden.empty());
  ASSERT_EQ(result->hidden_pieces.pieces().size(), 2u);
  EXPECT_EQ(result->hidden_pieces.pieces()[0].data(), request.raw[0].data()) << "not copied";
  EXPECT_EQ(result->hidden_pieces.pieces()[1].data(), request.raw[0].data() + 5);
  EXPECT_EQ(result->hidden_pieces.size(), 48u);
  EXPECT_THAT(result->topk_ids, ElementsAre(0, 7, -1, 3, 5, 5));
  EXPECT_THAT(result->topk_weights, ElementsAre(0.5f, 0.5f, 1, 0, 0.25f, 0.75f));

  view.inputs[0].typed_bytes.Append({request.raw[0].data(), 4});
  const auto surplus = ValidateRequest(view, model_, RequestLimits(), regions_);
  EXPECT_THAT(std::string(surplus.status().message()),
              HasSubstr("needs 48 bytes, but has 52 in inline contents"));
}

TEST_F(RequestValidationTest, NoTokensAreOrdinaryWithAndWithoutContents) {
  TestRequest request = ValidRequest();
  for (TestInput& input : request.inputs) input.shape[0] = 0;
  request.raw = {"", "", ""};
  auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->num_tokens, 0);
  EXPECT_TRUE(result->routed);
  EXPECT_TRUE(result->topk_ids.empty());
  EXPECT_EQ(result->output_bytes, 0u);
  request.raw.clear();
  EXPECT_TRUE(Validate(request).ok());
}

TEST_F(RequestValidationTest, AsManyTokensAsTheLimitAreAccepted) {
  TestRequest request = ValidRequest();
  for (TestInput& input : request.inputs) input.shape[0] = 16;
  request.raw = {std::string(16 * 4 * 4, 0), std::string(16 * 2 * 4, 0),
                 std::string(16 * 2 * 4, 0)};
  EXPECT_TRUE(Validate(request).ok());
}

TEST_F(RequestValidationTest, IdsMayBeLeftOutWhereTheModelHasARouter) {
  model_.has_router = true;
  TestRequest request = ValidRequest();
  request.inputs.resize(1);
  request.raw.resize(1);
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->routed);
  EXPECT_TRUE(result->topk_ids.empty());
  EXPECT_TRUE(result->topk_weights.empty());
  EXPECT_EQ(result->topk, 2);
}

TEST_F(RequestValidationTest, NonFiniteHiddenStatesAreTheCallersAffair) {
  TestRequest request = ValidRequest();
  request.raw[0] = BytesOf(std::vector<float>(12, kNan));
  EXPECT_TRUE(Validate(request).ok());
}

TEST_F(RequestValidationTest, KnownParametersAreAccepted) {
  TestRequest request = ValidRequest();
  request.parameters = {{"layer", std::int64_t{7}},
                        {"timeout", std::int64_t{2500}},
                        {"priority", std::uint64_t{1}},
                        {"triton_enable_empty_final_response", true}};
  request.model_version = "1";
  request.outputs = {{"hidden_states", {}}};
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layer, 7);
  EXPECT_EQ(result->timeout_us, 2500);
}

TEST_F(RequestValidationTest, IdsInSharedMemoryAreCopiedPrivatelyAndRowsAreLeftThere) {
  TestRequest request = ValidRequest();
  object_.Write(8, request.raw[0]);
  object_.Write(100, request.raw[1]);
  request.inputs[0].parameters = Window(48, 8);
  request.inputs[1].parameters = Window(24, 100);
  request.raw = {request.raw[2]};  // Raw entries belong to the others alone.
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  object_.Write(0, std::string(256, '\xff'));
  EXPECT_TRUE(result->hidden.empty());
  ASSERT_NE(result->source.region, nullptr);
  EXPECT_EQ(result->source.region->info().name, "region");
  EXPECT_EQ(result->source.offset_bytes, 8u);
  EXPECT_THAT(result->topk_ids, ElementsAre(0, 7, -1, 3, 5, 5));
  EXPECT_THAT(result->topk_weights, ElementsAre(0.5f, 0.5f, 1, 0, 0.25f, 0.75f));
}

TEST_F(RequestValidationTest, RowsThatTheOutputWouldOverwriteShiftedAreCopied) {
  TestRequest request = ValidRequest();
  const std::string hidden = request.raw[0];
  object_.Write(8, hidden);
  request.raw.erase(request.raw.begin());
  request.inputs[0].parameters = Window(48, 8);
  // Under another name, for it is the bytes that count.
  ASSERT_TRUE(regions_.Register("same", object_.key(), 4, 252).ok());
  struct Case {
    std::int64_t output_offset;  // in "same", whose byte 4 is the object's byte 8
    bool copied;
  };
  for (const Case& c : {Case{4, false}, Case{0, true}, Case{5, true}, Case{51, true},
                        Case{52, false}, Case{100, false}}) {
    request.outputs = {{"hidden_states", Window(48, c.output_offset, "same")}};
    const auto result = Validate(request);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->source.region == nullptr, c.copied) << c.output_offset;
    EXPECT_EQ(std::string(result->hidden.data(), result->hidden.size()), c.copied ? hidden : "");
  }
  // Equal offsets in another object share nothing.
  const ShmObject other(256);
  ASSERT_TRUE(regions_.Register("other", other.key(), 0, 256).ok());
  request.outputs = {{"hidden_states", Window(48, 9, "other")}};
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NE(result->source.region, nullptr);
}

TEST_F(RequestValidationTest, OffsetMayBeLeftOut) {
  TestRequest request = ValidRequest();
  object_.Write(0, request.raw[1]);
  request.inputs[1].parameters = Window(24);
  request.inputs[1].parameters.pop_back();
  request.raw.erase(request.raw.begin() + 1);
  const auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->topk_ids, ElementsAre(0, 7, -1, 3, 5, 5));
}

TEST_F(RequestValidationTest, OutputWindowMayBeLargerThanNeededAndHoldsItsRegion) {
  TestRequest request = ValidRequest();
  request.outputs = {{"hidden_states", Window(100, 156)}};
  auto result = Validate(request);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_NE(result->output.region, nullptr);
  EXPECT_EQ(result->output.offset_bytes, 156u);
  bool released = false;
  ASSERT_TRUE(
      regions_.Unregister(ShmKind::kSystem, "region", [&](const auto&) { released = true; }).ok());
  EXPECT_FALSE(released);
  result->output.region.reset();
  EXPECT_TRUE(released);
}

TEST_F(RequestValidationTest, OutputThatNoReplyHasRoomForIsRefusedUnlessItGoesToARegion) {
  TestRequest request = ValidRequest();
  model_.max_message_bytes = kReplyRestBytes + 48;
  EXPECT_TRUE(Validate(request).ok());
  model_.max_message_bytes = kReplyRestBytes + 47;
  for (const bool named : {false, true}) {
    if (named) request.outputs = {{"hidden_states", {}}};
    const auto result = Validate(request);
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument);
    for (const char* part : {"48 bytes", "--max-message-bytes 4143", "shared_memory_region"}) {
      EXPECT_THAT(std::string(result.status().message()), HasSubstr(part));
    }
  }
  request.outputs = {{"hidden_states", Window(48)}};
  EXPECT_TRUE(Validate(request).ok());
}

TEST_F(RequestValidationTest, SharedMemoryIsUnimplementedWhereSwitchedOff) {
  const ShmRegistry off((ShmOptions()));
  TestRequest request = ValidRequest();
  request.outputs = {{"hidden_states", Window(48)}};
  const auto result = ValidateRequest(request.View(), model_, RequestLimits(), off);
  EXPECT_EQ(result.status().code(), StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("--allow-client-shm"));
}

TEST_F(RequestValidationTest, RegionTruncatedAfterRegistrationIsRefused) {
  TestRequest request = ValidRequest();
  request.inputs[0].parameters = Window(48, 200);
  request.raw.erase(request.raw.begin());
  object_.Truncate(210);
  const auto result = Validate(request);
  EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("truncated"));
}

TEST_F(RequestValidationTest, ClientsNamesAreEscapedAndCutInMessages) {
  TestRequest request = ValidRequest();
  request.model_name = "bad\n" + std::string(1000, 'x');
  const std::string message(Validate(request).status().message());
  EXPECT_THAT(message, HasSubstr("'bad\\nxxx"));
  EXPECT_LT(message.size(), 200u);
}

}  // namespace
}  // namespace epserve::coordinator
