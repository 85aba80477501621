#include "client/cpp/plain_reply.h"

#include <grpcpp/support/slice.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "client/cpp/element_type.h"
#include "inference/grpc_service.pb.h"
#include "proto/wire/plain_fields.h"

namespace epserve::client {
namespace {

using inference::InferParameter;
using inference::ModelInferResponse;
using inference::ModelStreamInferResponse;
using Output = ModelInferResponse::InferOutputTensor;

// Longer ones go where their output is not copied twice.
constexpr std::size_t kMostReplyBytes = 16 << 10;

// As PlainFields, of messages whose fields are all strings or messages, but for a parameter's
// value.
class ReplyFields : public wire::PlainFields {
 public:
  using PlainFields::PlainFields;

  // Numbers up to 15, each at most once but for `repeated`; 0: none. REQUIRES: !done().
  int BytesField(int repeated) {
    const std::uint8_t tag = Tag();
    const int field = tag >> 3;
    if ((tag & 0x87) != 2) return Fail(), 0;
    if (field != repeated && (std::exchange(seen_, seen_ | 1u << field) & 1u << field) != 0) Fail();
    return field;
  }

  // One integer parameter's tag and number, and nothing else.
  std::int64_t IntParameter() {
    if (done() || Tag() != wire::VarintTag(InferParameter::kInt64ParamFieldNumber)) Fail();
    const auto number = static_cast<std::int64_t>(failed() ? 0 : Varint());
    if (!done()) Fail();
    return number;
  }

 private:
  std::uint32_t seen_ = 0;  // a bit for each field's number
};

// What is wanted of a reply whose shape and type are right.
struct PlainReply {
  std::string_view id;
  std::map<std::string, std::int64_t> parameters;
  std::string_view raw;
};

bool ReadIntParameter(std::string_view bytes, std::map<std::string, std::int64_t>& parameters) {
  ReplyFields fields(bytes);
  std::string_view name;
  std::optional<std::int64_t> value;
  while (!fields.done()) {
    switch (fields.BytesField(/*repeated=*/0)) {
      case 1:
        name = fields.Text();
        break;
      case 2: {
        ReplyFields number(fields.Bytes());
        value = number.IntParameter();
        if (number.failed()) fields.Fail();
        break;
      }
      default:
        return false;
    }
  }
  return !fields.failed() && value.has_value() && parameters.emplace(name, *value).second;
}

bool IsExpected(std::string_view bytes, const ExpectedOutput& expected) {
  ReplyFields fields(bytes);
  bool named = false;
  bool typed = false;
  bool shaped = false;
  while (!fields.done()) {
    switch (fields.BytesField(/*repeated=*/0)) {
      case Output::kNameFieldNumber:
        named = fields.Bytes() == kHiddenStates;
        break;
      case Output::kDatatypeFieldNumber:
        typed = fields.Bytes() == KserveName(expected.type);
        break;
      case Output::kShapeFieldNumber: {
        ReplyFields sizes(fields.Bytes());
        shaped = std::all_of(expected.shape.begin(), expected.shape.end(), [&](std::int64_t size) {
          return !sizes.done() && sizes.Varint() == static_cast<std::uint64_t>(size);
        });
        shaped = shaped && sizes.done() && !sizes.failed();
        break;
      }
      default:
        return false;
    }
  }
  return !fields.failed() && named && typed && shaped;
}

bool ReadResponse(std::string_view bytes, const ExpectedOutput& expected, PlainReply& reply) {
  ReplyFields fields(bytes);
  bool has_output = false;
  bool has_raw = false;
  while (!fields.done()) {
    switch (fields.BytesField(/*repeated=*/ModelInferResponse::kParametersFieldNumber)) {
      case ModelInferResponse::kModelNameFieldNumber:
      case ModelInferResponse::kModelVersionFieldNumber:
        fields.Text();
        break;
      case ModelInferResponse::kIdFieldNumber:
        reply.id = fields.Text();
        break;
      case ModelInferResponse::kParametersFieldNumber:
        if (!ReadIntParameter(fields.Bytes(), reply.parameters)) return false;
        break;
      case ModelInferResponse::kOutputsFieldNumber:
        has_output = IsExpected(fields.Bytes(), expected);
        break;
      case ModelInferResponse::kRawOutputContentsFieldNumber:
        reply.raw = fields.Bytes();
        has_raw = true;
        break;
      default:
        return false;
    }
  }
  return !fields.failed() && has_output && has_raw;
}

}  // namespace

std::optional<InferResult> PlainResultOf(const ExpectedOutput& expected,
                                         const grpc::ByteBuffer& reply, ReplyForm form,
                                         TensorBytes& spare) {
  if (expected.place.has_value() || !reply.Valid() || reply.Length() > kMostReplyBytes) {
    return std::nullopt;
  }
  grpc::Slice slice;
  if (!reply.TrySingleSlice(&slice).ok() && !reply.DumpToSingleSlice(&slice).ok()) {
    return std::nullopt;
  }
  std::string_view bytes(reinterpret_cast<const char*>(slice.begin()), slice.size());
  if (form == ReplyForm::kStreamed) {
    ReplyFields fields(bytes);
    if (fields.done() ||
        fields.BytesField(/*repeated=*/0) != ModelStreamInferResponse::kInferResponseFieldNumber) {
      return std::nullopt;
    }
    bytes = fields.Bytes();
    if (fields.failed() || !fields.done()) return std::nullopt;
  }
  PlainReply plain;
  if (!ReadResponse(bytes, expected, plain)) return std::nullopt;
  const std::optional<std::int64_t> elements = ElementCount(expected.shape);
  if (!elements ||
      plain.raw.size() != static_cast<std::uint64_t>(*elements) * ElementSize(expected.type)) {
    return std::nullopt;
  }
  TensorMemory memory(plain.raw.size(), std::move(spare));
  std::copy(plain.raw.begin(), plain.raw.end(), memory.data());
  InferResult result;
  result.id = plain.id;
  result.hidden_states.type = expected.type;
  result.hidden_states.shape = expected.shape;
  result.hidden_states.bytes = std::move(memory);
  result.parameters = std::move(plain.parameters);
  return result;
}

}  // namespace epserve::client
