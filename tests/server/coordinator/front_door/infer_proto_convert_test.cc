// Requests from their messages' bytes: large tensors are seen where gRPC has put them, in either
// form, and the view is what the parser makes of the whole message.
#include "server/coordinator/front_door/infer_proto_convert.h"

#include <gmock/gmock.h>
#include <grpcpp/support/slice.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "inference/grpc_service.pb.h"
#include "proto/wire/wire_text.h"
#include "server/coordinator/front_door/request_bounds.h"
#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using ::testing::HasSubstr;

constexpr std::int64_t kTokens = 4096;
constexpr std::int64_t kHidden = 512;
constexpr std::int64_t kTopk = 8;

ServedModel LargeModel() {
  ServedModel model = TestModel();
  model.max_batch_tokens = kTokens;
  model.hidden = kHidden;
  model.topk = kTopk;
  return model;
}

// Of the largest batch: 8 MiB of hidden states.
ModelInferRequest TypedBatch() {
  ModelInferRequest message;
  message.set_model_name("tiny");
  message.set_id("typed");
  for (const char* name : {"hidden_states", "topk_ids", "topk_weights"}) {
    auto* input = message.add_inputs();
    input->set_name(name);
    input->set_datatype(std::string(name) == "topk_ids" ? "INT32" : "FP32");
    input->add_shape(kTokens);
    input->add_shape(std::string(name) == "hidden_states" ? kHidden : kTopk);
  }
  auto* hidden = message.mutable_inputs(0)->mutable_contents()->mutable_fp32_contents();
  auto* ids = message.mutable_inputs(1)->mutable_contents()->mutable_int_contents();
  auto* weights = message.mutable_inputs(2)->mutable_contents()->mutable_fp32_contents();
  for (std::int64_t i = 0; i < kTokens * kHidden; ++i) hidden->Add(0.25f * static_cast<float>(i));
  for (std::int64_t i = 0; i < kTokens * kTopk; ++i) {
    ids->Add(static_cast<std::int32_t>(i % 9) - 1);
    weights->Add(1.0f / static_cast<float>(i + 1));
  }
  return message;
}

// As gRPC has a message: in pieces of 8 KiB and a few bytes.
std::vector<grpc::Slice> Slices(const std::string& bytes) {
  constexpr std::size_t kSliceBytes = (8 << 10) + 3;
  std::vector<grpc::Slice> slices;
  for (std::size_t at = 0; at < bytes.size(); at += kSliceBytes) {
    slices.emplace_back(bytes.substr(at, kSliceBytes));
  }
  return slices;
}

absl::StatusOr<InferRequestMessage> Parse(const std::vector<grpc::Slice>& slices) {
  return ParseInferRequest(grpc::ByteBuffer(slices.data(), slices.size()),
                           RequestLimitsOf(LargeModel()));
}

bool LiesIn(const RawView& view, const std::vector<grpc::Slice>& slices) {
  return std::all_of(view.pieces().begin(), view.pieces().end(), [&](auto piece) {
    return std::any_of(slices.begin(), slices.end(), [&](const grpc::Slice& slice) {
      const char* const begin = reinterpret_cast<const char*>(slice.begin());
      return piece.data() >= begin && piece.data() + piece.size() <= begin + slice.size();
    });
  });
}

std::string Joined(const RawView& view) {
  std::string bytes(view.size(), '?');
  view.Copy(0, bytes);
  return bytes;
}

TEST(InferProtoConvertTest, LargeTypedElementsAreSeenWhereTheyCame) {
  const ModelInferRequest message = TypedBatch();
  const std::vector<grpc::Slice> slices = Slices(message.SerializeAsString());
  const auto request = Parse(slices);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->id, "typed");
  ASSERT_EQ(request->view.inputs.size(), 3u);
  for (const int i : {0, 2}) {
    const InputView& input = request->view.inputs[static_cast<std::size_t>(i)];
    const auto& elements = message.inputs(i).contents().fp32_contents();
    EXPECT_EQ(input.typed_kind, TypedKind::kFp32);
    EXPECT_TRUE(LiesIn(input.typed_bytes, slices)) << "input " << i << " was copied";
    EXPECT_TRUE(Joined(input.typed_bytes) ==
                BytesOf(std::vector<float>(elements.begin(), elements.end())));
  }
  const auto& ids = message.inputs(1).contents().int_contents();
  EXPECT_EQ(request->view.inputs[1].typed_kind, TypedKind::kInt32);
  EXPECT_TRUE(Joined(request->view.inputs[1].typed_bytes) ==
              BytesOf(std::vector<std::int32_t>(ids.begin(), ids.end())));
}

TEST(InferProtoConvertTest, TheMessageKeepsWhatItsViewShows) {
  const ModelInferRequest message = TypedBatch();
  absl::StatusOr<InferRequestMessage> request = absl::UnknownError("");
  {
    const std::vector<grpc::Slice> slices = Slices(message.SerializeAsString());
    request = Parse(slices);
  }
  ASSERT_TRUE(request.ok()) << request.status();
  const auto& elements = message.inputs(0).contents().fp32_contents();
  EXPECT_TRUE(Joined(request->view.inputs[0].typed_bytes) ==
              BytesOf(std::vector<float>(elements.begin(), elements.end())));
}

TEST(InferProtoConvertTest, LargeElementsBesideThoseOfAnotherTypeAreOfSeveral) {
  ModelInferRequest message = TypedBatch();
  message.mutable_inputs(0)->mutable_contents()->add_bool_contents(true);
  const auto request = Parse(Slices(message.SerializeAsString()));
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->view.inputs[0].typed_kind, TypedKind::kSeveral);
  EXPECT_EQ(request->view.inputs[0].typed_bytes.size(), 0u);
  EXPECT_EQ(request->view.inputs[2].typed_kind, TypedKind::kFp32);
}

TEST(InferProtoConvertTest, LargeElementsThatHaveToBePutTogetherAreRefusedBeforeThat) {
  const std::string input = TypedBatch().inputs(0).SerializeAsString();
  ModelInferRequest::InferInputTensor more;
  more.mutable_contents()->add_fp32_contents(1);
  const auto with_input = [](const std::string& bytes) {
    std::string message;
    wire::AppendBytesField(ModelInferRequest::kInputsFieldNumber, bytes, message);
    return message;
  };
  EXPECT_TRUE(Parse(Slices(with_input(input))).ok());
  const auto refused = Parse(Slices(with_input(input + more.SerializeAsString())));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("4194304 bytes of fp32_contents that are not one packed field of an input; "
                        "send what the model's tensors need, in raw_input_contents"));
}

}  // namespace
}  // namespace epserve::coordinator
