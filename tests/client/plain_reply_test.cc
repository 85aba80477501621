// Plain replies are read as Protobuf reads them, and whatever is not plain is left to it.
#include "client/cpp/plain_reply.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "client/cpp/infer_message.h"
#include "inference/grpc_service.pb.h"

namespace epserve::client {
namespace {

using inference::ModelInferResponse;
using inference::ModelStreamInferResponse;

const ExpectedOutput kExpected = {{2, 3}, ElementType::kBf16, std::nullopt};
const std::string kRaw = "abcdefghijkl";

ModelInferResponse UsualResponse() {
  ModelInferResponse response;
  response.set_model_name("model");
  response.set_model_version("1");
  response.set_id("7");
  (*response.mutable_parameters())["epserve_epoch"].set_int64_param(1'700'000'000'000);
  (*response.mutable_parameters())["epserve_queue_us"].set_int64_param(0);
  (*response.mutable_parameters())["negative"].set_int64_param(-1);
  auto* output = response.add_outputs();
  output->set_name("hidden_states");
  output->set_datatype("BF16");
  output->add_shape(2);
  output->add_shape(3);
  response.add_raw_output_contents(kRaw);
  return response;
}

std::string Streamed(const ModelInferResponse& response) {
  ModelStreamInferResponse message;
  *message.mutable_infer_response() = response;
  return message.SerializeAsString();
}

grpc::ByteBuffer CutBuffer(const std::string& bytes, std::size_t cut = 0) {
  const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)), grpc::Slice(bytes.substr(cut))};
  return cut == 0 ? grpc::ByteBuffer(&slices[1], 1) : grpc::ByteBuffer(slices, 2);
}

std::optional<InferResult> Read(const std::string& bytes, ReplyForm form, std::size_t cut = 0) {
  TensorBytes spare;
  return PlainResultOf(kExpected, CutBuffer(bytes, cut), form, spare);
}

void ExpectUsual(const std::optional<InferResult>& result) {
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->id, "7");
  EXPECT_EQ(result->hidden_states.shape, kExpected.shape);
  EXPECT_EQ(result->hidden_states.type, kExpected.type);
  EXPECT_EQ(result->hidden_states.bytes, TensorBytes(kRaw));
  const std::map<std::string, std::int64_t> parameters = {
      {"epserve_epoch", 1'700'000'000'000}, {"epserve_queue_us", 0}, {"negative", -1}};
  EXPECT_EQ(result->parameters, parameters);
}

TEST(PlainReplyTest, UsualRepliesAreReadWholeHoweverTheyAreCut) {
  const std::string unary = UsualResponse().SerializeAsString();
  const std::string streamed = Streamed(UsualResponse());
  for (const std::size_t cut : {0, 1, 40}) {
    ExpectUsual(Read(unary, ReplyForm::kUnary, cut));
    ExpectUsual(Read(streamed, ReplyForm::kStreamed, cut));
  }
}

TEST(PlainReplyTest, OutputIsWrittenToTheSpareMemory) {
  TensorBytes spare = std::string(100, 's');
  const char* const at = spare.data();
  const auto result = PlainResultOf(kExpected, CutBuffer(UsualResponse().SerializeAsString()),
                                    ReplyForm::kUnary, spare);
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->hidden_states.bytes.data(), at);
}

TEST(PlainReplyTest, WhatIsNotPlainIsLeftToProtobuf) {
  const std::vector<std::pair<const char*, std::function<void(ModelInferResponse*)>>> cases = {
      {"other output", [](auto* r) { r->mutable_outputs(0)->set_name("other"); }},
      {"other type", [](auto* r) { r->mutable_outputs(0)->set_datatype("FP16"); }},
      {"other shape", [](auto* r) { r->mutable_outputs(0)->set_shape(1, 4); }},
      {"longer shape", [](auto* r) { r->mutable_outputs(0)->add_shape(1); }},
      {"parameter of an output",
       [](auto* r) { (*r->mutable_outputs(0)->mutable_parameters())["a"].set_int64_param(1); }},
      {"two outputs", [](auto* r) { *r->add_outputs() = r->outputs(0); }},
      {"no output", [](auto* r) { r->clear_outputs(); }},
      {"two contents", [](auto* r) { r->add_raw_output_contents(kRaw); }},
      {"no contents", [](auto* r) { r->clear_raw_output_contents(); }},
      {"short contents", [](auto* r) { r->set_raw_output_contents(0, "abc"); }},
      {"long contents", [](auto* r) { r->set_raw_output_contents(0, kRaw + "m"); }},
      {"text parameter",
       [](auto* r) { (*r->mutable_parameters())["epserve_trace"].set_string_param("{}"); }},
      {"empty parameter", [](auto* r) { (*r->mutable_parameters())["none"]; }},
      {"id of other letters", [](auto* r) { r->set_id("\xc3\xa4"); }},
      {"large reply", [](auto* r) { r->set_id(std::string(20'000, 'i')); }},
  };
  for (const auto& [what, change] : cases) {
    ModelInferResponse response = UsualResponse();
    change(&response);
    EXPECT_FALSE(Read(response.SerializeAsString(), ReplyForm::kUnary)) << what;
    EXPECT_FALSE(Read(Streamed(response), ReplyForm::kStreamed)) << what;
  }
  ModelStreamInferResponse failed;
  failed.set_error_message("why");
  *failed.mutable_infer_response() = UsualResponse();
  EXPECT_FALSE(Read(failed.SerializeAsString(), ReplyForm::kStreamed));
  EXPECT_FALSE(Read("", ReplyForm::kStreamed));
  EXPECT_FALSE(Read("", ReplyForm::kUnary));
  TensorBytes spare = std::string("spare");
  EXPECT_FALSE(PlainResultOf(kExpected, grpc::ByteBuffer(), ReplyForm::kUnary, spare));
  EXPECT_EQ(spare, TensorBytes(std::string("spare")));
}

TEST(PlainReplyTest, ReplyForAPlaceInARegionIsLeftToProtobuf) {
  ExpectedOutput placed = kExpected;
  placed.place = RegionPlace{"region", 0};
  TensorBytes spare;
  EXPECT_FALSE(PlainResultOf(placed, CutBuffer(UsualResponse().SerializeAsString()),
                             ReplyForm::kUnary, spare));
}

// Damaged replies: where one is read here, Protobuf reads the same.
TEST(PlainReplyTest, DamagedRepliesAreReadAsProtobufReadsThemOrNotAtAll) {
  const std::string whole = Streamed(UsualResponse());
  std::mt19937 random(1);
  int num_read = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = whole;
    for (int change = random() % 2; change >= 0; --change) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    const std::optional<InferResult> plain = Read(bytes, ReplyForm::kStreamed);
    if (!plain) continue;
    ++num_read;
    ModelStreamInferResponse message;
    ASSERT_TRUE(message.ParseFromString(bytes)) << i;
    const ModelInferResponse& response = message.infer_response();
    EXPECT_EQ(message.error_message(), "");
    EXPECT_EQ(plain->id, response.id());
    ASSERT_EQ(response.outputs_size(), 1);
    EXPECT_EQ(response.outputs(0).name(), "hidden_states");
    ASSERT_EQ(response.raw_output_contents_size(), 1);
    EXPECT_EQ(std::string_view(plain->hidden_states.bytes), response.raw_output_contents(0));
    ASSERT_EQ(plain->parameters.size(), response.parameters().size());
    for (const auto& [name, value] : plain->parameters) {
      ASSERT_TRUE(response.parameters().contains(name));
      EXPECT_EQ(response.parameters().at(name).int64_param(), value);
    }
  }
  EXPECT_GT(num_read, 1'000) << "the damage leaves nothing to compare";
}

}  // namespace
}  // namespace epserve::client
