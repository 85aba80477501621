// Requests as they go over the wire, read by the generated code.
#include "client/cpp/infer_message.h"

#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "inference/grpc_service.pb.h"

namespace epserve::client {
namespace {

using google::protobuf::util::MessageDifferencer;
using inference::ModelInferRequest;

constexpr std::int64_t kTokens = 2;
constexpr std::int64_t kHidden = 3;

Tensor TensorOf(ElementType type, std::vector<std::int64_t> shape) {
  Tensor tensor;
  tensor.type = type;
  tensor.shape = std::move(shape);
  tensor.bytes =
      std::string(static_cast<std::size_t>(*ElementCount(tensor.shape)) * ElementSize(type), 'x');
  return tensor;
}

InferRequest PlainInferRequest() {
  InferRequest request;
  request.model = "model";
  request.hidden_states = TensorOf(ElementType::kBf16, {kTokens, kHidden});
  return request;
}

void AddInput(const char* name, const char* datatype, std::int64_t columns,
              ModelInferRequest* message) {
  auto* input = message->add_inputs();
  input->set_name(name);
  input->set_datatype(datatype);
  input->add_shape(kTokens);
  input->add_shape(columns);
}

ModelInferRequest PlainExpected() {
  ModelInferRequest expected;
  expected.set_model_name("model");
  AddInput("hidden_states", "BF16", kHidden, &expected);
  expected.add_outputs()->set_name("hidden_states");
  return expected;
}

void ExpectHead(const InferRequest& request, const ModelInferRequest& expected) {
  const absl::StatusOr<RequestParts> parts = ToMessage(request);
  ASSERT_TRUE(parts.ok()) << parts.status();
  ModelInferRequest message;
  ASSERT_TRUE(message.ParseFromString(parts->head));
  EXPECT_TRUE(MessageDifferencer::Equals(message, expected))
      << message.DebugString() << " is not " << expected.DebugString();
}

TEST(InferMessageTest, RequestWithoutRoutingHasOneInput) {
  ExpectHead(PlainInferRequest(), PlainExpected());
  EXPECT_EQ(ToMessage(PlainInferRequest())->raw.size(), 1u);
}

TEST(InferMessageTest, RoutedRequestHasAllInputsAndItsParameters) {
  InferRequest request = PlainInferRequest();
  request.id = "an id of some length";
  request.layer = -7;
  request.trace = true;
  request.topk_ids = TensorOf(ElementType::kI64, {kTokens, 1});
  request.topk_weights = TensorOf(ElementType::kF32, {kTokens, 1});
  ModelInferRequest expected = PlainExpected();
  expected.set_id("an id of some length");
  (*expected.mutable_parameters())["layer"].set_int64_param(-7);
  (*expected.mutable_parameters())["epserve_trace"].set_bool_param(true);
  AddInput("topk_ids", "INT64", 1, &expected);
  AddInput("topk_weights", "FP32", 1, &expected);
  ExpectHead(request, expected);
  const absl::StatusOr<RequestParts> parts = ToMessage(request);
  ASSERT_EQ(parts->raw.size(), 3u);
  EXPECT_EQ(parts->raw[0], request.hidden_states.bytes);
  EXPECT_EQ(parts->raw[1], request.topk_ids->bytes);
  EXPECT_EQ(parts->raw[2], request.topk_weights->bytes);
}

TEST(InferMessageTest, PlacesInRegionsAreParametersAndHaveNoBytes) {
  InferRequest request = PlainInferRequest();
  request.hidden_states.bytes = std::string();
  request.hidden_states.place = RegionPlace{"in", 4096};
  request.output_place = RegionPlace{std::string(200, 'r'), std::uint64_t{1} << 40};
  ModelInferRequest expected = PlainExpected();
  const auto set_place = [](const std::string& region, std::int64_t offset, auto* parameters) {
    (*parameters)["shared_memory_region"].set_string_param(region);
    (*parameters)["shared_memory_byte_size"].set_int64_param(kTokens * kHidden * 2);
    (*parameters)["shared_memory_offset"].set_int64_param(offset);
  };
  set_place("in", 4096, expected.mutable_inputs(0)->mutable_parameters());
  set_place(std::string(200, 'r'), std::int64_t{1} << 40,
            expected.mutable_outputs(0)->mutable_parameters());
  ExpectHead(request, expected);
  EXPECT_TRUE(ToMessage(request)->raw.empty());
}

TEST(InferMessageTest, TensorThatDoesNotFillItsShapeIsRefused) {
  InferRequest request = PlainInferRequest();
  request.hidden_states.bytes = std::string("short");
  EXPECT_EQ(ToMessage(request).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace epserve::client
