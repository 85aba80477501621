// Requests read without the protocol library: those that clients write are read so, and whatever is
// read so, spoilt bytes too, is what the library reads.
#include "server/coordinator/front_door/plain_request.h"

#include <gmock/gmock.h>
#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <random>
#include <string>

#include "inference/grpc_service.pb.h"

namespace epserve::coordinator {
namespace {

using inference::InferParameter;
using inference::ModelInferRequest;
using ::testing::ElementsAreArray;

// As clients write it: raw tensors, one of them in a region, and a parameter of each kind.
ModelInferRequest PlainMessage() {
  ModelInferRequest message;
  message.set_model_name("model");
  message.set_model_version("1");
  message.set_id("an id");
  auto& parameters = *message.mutable_parameters();
  parameters["layer"].set_int64_param(-3);
  parameters["epserve_trace"].set_bool_param(true);
  parameters["triton_text"].set_string_param("text");
  parameters["triton_double"].set_double_param(0.5);
  parameters["triton_unsigned"].set_uint64_param(~std::uint64_t{0});
  for (const char* name : {"hidden_states", "topk_ids", "topk_weights"}) {
    auto* input = message.add_inputs();
    input->set_name(name);
    input->set_datatype("FP32");
    input->add_shape(200);
    input->add_shape(-1);
  }
  auto& window = *message.mutable_inputs(1)->mutable_parameters();
  window["shared_memory_region"].set_string_param("region");
  window["shared_memory_byte_size"].set_int64_param(std::int64_t{1} << 62);
  auto* output = message.add_outputs();
  output->set_name("hidden_states");
  (*output->mutable_parameters())["shared_memory_offset"].set_int64_param(0);
  message.add_raw_input_contents(std::string(300, 'x'));
  message.add_raw_input_contents("");
  return message;
}

struct ReadRequest {
  bool plain = false;
  PlainShapes shapes;
  RequestView view;
  std::string_view id;
};

void Read(std::string_view bytes, ReadRequest& read) {
  read.plain = ReadPlainRequest(bytes, RequestLimits(), read.shapes, read.view, read.id);
}

bool IsPlain(const std::string& bytes) {
  ReadRequest read;
  Read(bytes, read);
  return read.plain;
}
bool IsPlain(const ModelInferRequest& message) { return IsPlain(message.SerializeAsString()); }

ParameterView::Value ValueOf(const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kBoolParam:
      return parameter.bool_param();
    case InferParameter::kInt64Param:
      return std::int64_t{parameter.int64_param()};
    case InferParameter::kStringParam:
      return std::string_view(parameter.string_param());
    case InferParameter::kDoubleParam:
      return parameter.double_param();
    case InferParameter::kUint64Param:
      return std::uint64_t{parameter.uint64_param()};
    case InferParameter::PARAMETER_CHOICE_NOT_SET:
      break;
  }
  return std::monostate();
}

// Doubles by their bits: what is no number equals itself here.
bool Same(const ParameterView::Value& a, const ParameterView::Value& b) {
  const auto* x = std::get_if<double>(&a);
  const auto* y = std::get_if<double>(&b);
  if (x == nullptr || y == nullptr) return a == b;
  return std::bit_cast<std::uint64_t>(*x) == std::bit_cast<std::uint64_t>(*y);
}

template <typename Map>
void ExpectSame(const std::vector<ParameterView>& views, const Map& map) {
  ASSERT_EQ(views.size(), map.size());
  for (const ParameterView& view : views) {
    const auto found = map.find(std::string(view.name));
    ASSERT_TRUE(found != map.end()) << view.name;
    EXPECT_TRUE(Same(view.value, ValueOf(found->second))) << view.name;
  }
}

void ExpectSame(const ReadRequest& read, const ModelInferRequest& message) {
  const RequestView& view = read.view;
  EXPECT_EQ(read.id, message.id());
  EXPECT_EQ(view.model_name, message.model_name());
  EXPECT_EQ(view.model_version, message.model_version());
  ExpectSame(view.parameters, message.parameters());
  ASSERT_EQ(view.inputs.size(), static_cast<std::size_t>(message.inputs_size()));
  for (int i = 0; i < message.inputs_size(); ++i) {
    const InputView& input = view.inputs[static_cast<std::size_t>(i)];
    EXPECT_EQ(input.name, message.inputs(i).name());
    EXPECT_EQ(input.datatype, message.inputs(i).datatype());
    EXPECT_THAT(input.shape, ElementsAreArray(message.inputs(i).shape()));
    ExpectSame(input.parameters, message.inputs(i).parameters());
    EXPECT_EQ(input.typed_kind, TypedKind::kNone);
    EXPECT_FALSE(message.inputs(i).has_contents());
  }
  ASSERT_EQ(view.outputs.size(), static_cast<std::size_t>(message.outputs_size()));
  for (int i = 0; i < message.outputs_size(); ++i) {
    const OutputView& output = view.outputs[static_cast<std::size_t>(i)];
    EXPECT_EQ(output.name, message.outputs(i).name());
    ExpectSame(output.parameters, message.outputs(i).parameters());
  }
  ASSERT_EQ(view.raw_contents.size(), static_cast<std::size_t>(message.raw_input_contents_size()));
  for (int i = 0; i < message.raw_input_contents_size(); ++i) {
    std::string raw(view.raw_contents[static_cast<std::size_t>(i)].size(), '?');
    view.raw_contents[static_cast<std::size_t>(i)].Copy(0, raw);
    EXPECT_EQ(raw, message.raw_input_contents(i));
  }
}

TEST(PlainRequestTest, WhatClientsWriteIsReadAsItIs) {
  const ModelInferRequest message = PlainMessage();
  const std::string bytes = message.SerializeAsString();
  ReadRequest read;
  Read(bytes, read);
  ASSERT_TRUE(read.plain);
  ExpectSame(read, message);
}

TEST(PlainRequestTest, AMessageWithoutFieldsIsPlain) { EXPECT_TRUE(IsPlain(std::string())); }

TEST(PlainRequestTest, OtherFormsAreLeftToTheLibrary) {
  ModelInferRequest message = PlainMessage();
  message.set_id("\xc3\xa4");
  EXPECT_FALSE(IsPlain(message)) << "not ASCII";

  message = PlainMessage();
  message.mutable_inputs(0)->mutable_contents()->add_fp32_contents(1);
  EXPECT_FALSE(IsPlain(message)) << "typed contents";

  message = PlainMessage();
  (*message.mutable_parameters())["nothing"].clear_parameter_choice();
  EXPECT_FALSE(IsPlain(message)) << "a parameter without a value";

  message = PlainMessage();
  for (int i = 0; i < 11; ++i) message.mutable_inputs(0)->add_shape(1);
  EXPECT_FALSE(IsPlain(message)) << "more dimensions than there is place for";

  const std::string plain = PlainMessage().SerializeAsString();
  const auto twice = [](const ModelInferRequest& once) {
    return once.SerializeAsString() + once.SerializeAsString();
  };
  ModelInferRequest text;
  text.set_model_name("model");
  EXPECT_TRUE(IsPlain(text));
  EXPECT_FALSE(IsPlain(twice(text))) << "a text twice";
  ModelInferRequest parameter;
  (*parameter.mutable_parameters())["layer"].set_int64_param(3);
  EXPECT_TRUE(IsPlain(parameter));
  EXPECT_FALSE(IsPlain(twice(parameter))) << "a parameter twice";
  EXPECT_FALSE(IsPlain(plain + std::string("\x40\x01", 2))) << "an unknown field";
  EXPECT_FALSE(IsPlain(plain + '\x3b')) << "a group";
  EXPECT_FALSE(IsPlain(plain.substr(0, plain.size() - 3))) << "an end that is missing";
}

TEST(PlainRequestTest, AtTheLimitsItIsPlainAndBeyondNot) {
  const RequestLimits limits;
  ModelInferRequest inputs;
  for (std::size_t i = 0; i < limits.max_inputs; ++i) inputs.add_inputs();
  EXPECT_TRUE(IsPlain(inputs));
  inputs.add_inputs();
  EXPECT_FALSE(IsPlain(inputs));

  ModelInferRequest raw;
  for (std::size_t i = 0; i < limits.max_inputs; ++i) raw.add_raw_input_contents("x");
  EXPECT_TRUE(IsPlain(raw));
  raw.add_raw_input_contents("x");
  EXPECT_FALSE(IsPlain(raw));

  ModelInferRequest outputs;
  for (std::size_t i = 0; i < limits.max_outputs; ++i) outputs.add_outputs();
  EXPECT_TRUE(IsPlain(outputs));
  outputs.add_outputs();
  EXPECT_FALSE(IsPlain(outputs));

  ModelInferRequest parameters;
  ModelInferRequest of_tensors;
  of_tensors.add_inputs();
  of_tensors.add_outputs();
  for (std::size_t i = 0; i < limits.max_parameters; ++i) {
    const std::string name = std::to_string(i);
    (*parameters.mutable_parameters())[name].set_bool_param(true);
    auto& of_tensor = i % 2 == 0 ? *of_tensors.mutable_inputs(0)->mutable_parameters()
                                 : *of_tensors.mutable_outputs(0)->mutable_parameters();
    of_tensor[name].set_bool_param(true);
  }
  EXPECT_TRUE(IsPlain(parameters));
  EXPECT_TRUE(IsPlain(of_tensors));
  (*parameters.mutable_parameters())["one more"].set_bool_param(true);
  (*of_tensors.mutable_outputs(0)->mutable_parameters())["one more"].set_bool_param(true);
  EXPECT_FALSE(IsPlain(parameters));
  EXPECT_FALSE(IsPlain(of_tensors));
}

TEST(PlainRequestTest, SpoiltBytesAreReadAsTheLibraryReadsThemOrNotAtAll) {
  google::protobuf::SetLogHandler(nullptr);  // Bytes that are no message are expected here.
  std::mt19937 random(11);
  const std::string whole = PlainMessage().SerializeAsString();
  int num_plain = 0;
  for (int round = 0; round < 30'000; ++round) {
    std::string bytes = whole;
    const int num_changes = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < num_changes && !bytes.empty(); ++i) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
          break;
        case 2:
          bytes.erase(at, 1 + random() % 4);
          break;
        default:
          bytes.insert(at, bytes, random() % bytes.size(), random() % 12);
      }
    }
    ReadRequest read;
    Read(bytes, read);
    if (!read.plain) continue;
    ++num_plain;
    ModelInferRequest message;
    ASSERT_TRUE(message.ParseFromString(bytes)) << "round " << round;
    EXPECT_TRUE(message.GetReflection()->GetUnknownFields(message).empty()) << "round " << round;
    ExpectSame(read, message);
    if (testing::Test::HasFailure()) FAIL() << "round " << round;
  }
  EXPECT_GT(num_plain, 1000);  // Else this would say nothing.
}

}  // namespace
}  // namespace epserve::coordinator
