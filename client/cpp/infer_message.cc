#include "client/cpp/infer_message.h"

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/plain_reply.h"
#include "client/cpp/retry.h"
#include "client/cpp/status.h"
#include "inference/grpc_service.pb.h"
#include "proto/wire/wire_text.h"

namespace epserve::client {
namespace {

using inference::InferParameter;
using inference::ModelInferRequest;

// An entry of a map of parameters, with `value` the field of InferParameter.
void AppendParameter(int field, std::string_view name, const std::string& value,
                     std::string& text) {
  constexpr int kName = 1;  // as in every entry of a map
  constexpr int kValue = 2;
  std::string entry;
  wire::AppendBytesField(kName, name, entry);
  wire::AppendBytesField(kValue, value, entry);
  wire::AppendBytesField(field, entry, text);
}

std::string IntValue(std::int64_t number) {
  std::string value;
  wire::AppendIntField(InferParameter::kInt64ParamFieldNumber, number, value);
  return value;
}

std::string BoolValue(bool flag) {
  std::string value;
  wire::AppendIntField(InferParameter::kBoolParamFieldNumber, flag ? 1 : 0, value);
  return value;
}

void AppendPlace(int field, const RegionPlace& place, std::uint64_t size_bytes, std::string& text) {
  std::string region;
  wire::AppendBytesField(InferParameter::kStringParamFieldNumber, place.region, region);
  AppendParameter(field, "shared_memory_region", region, text);
  AppendParameter(field, "shared_memory_byte_size", IntValue(static_cast<std::int64_t>(size_bytes)),
                  text);
  AppendParameter(field, "shared_memory_offset",
                  IntValue(static_cast<std::int64_t>(place.offset_bytes)), text);
}

std::uint64_t SizeBytes(const Tensor& tensor) {
  return static_cast<std::uint64_t>(*ElementCount(tensor.shape)) * ElementSize(tensor.type);
}

absl::Status AddInput(const char* name, const Tensor& tensor, RequestParts& parts) {
  const auto count = ElementCount(tensor.shape);
  const char* datatype = KserveName(tensor.type);
  const bool placed = tensor.place.has_value();
  const std::uint64_t needed = count && !placed ? SizeBytes(tensor) : 0;
  if (datatype == nullptr || !count || tensor.bytes.size() != needed) {
    return absl::InvalidArgumentError(
        absl::StrCat("infer: ", name, " has ", tensor.bytes.size(),
                     placed ? " bytes beside its place in a region, or " : " bytes, which ",
                     "shape ", ShapeString(tensor.shape), " of ", SafetensorsName(tensor.type),
                     placed ? " is none" : " does not fill"));
  }
  using Input = ModelInferRequest::InferInputTensor;
  std::string shape;
  for (const std::int64_t size : tensor.shape) {
    wire::AppendVarint(static_cast<std::uint64_t>(size), shape);
  }
  std::string input;
  wire::AppendBytesField(Input::kNameFieldNumber, name, input);
  wire::AppendBytesField(Input::kDatatypeFieldNumber, datatype, input);
  wire::AppendBytesField(Input::kShapeFieldNumber, shape, input);
  if (placed) {
    AppendPlace(Input::kParametersFieldNumber, *tensor.place, SizeBytes(tensor), input);
  } else {
    parts.raw.push_back(tensor.bytes);
  }
  wire::AppendBytesField(ModelInferRequest::kInputsFieldNumber, input, parts.head);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RequestParts> ToMessage(const InferRequest& request) {
  if (request.model.empty()) {
    return absl::InvalidArgumentError("infer: model is empty; name one, as from OnlyModel()");
  }
  if (request.topk_ids.has_value() != request.topk_weights.has_value()) {
    return absl::InvalidArgumentError(
        "infer: only one of topk_ids and topk_weights is given; give both or neither");
  }
  // What has no tensors in it, for a name and an id of some length.
  constexpr std::size_t kUsualBytes = 512;
  using Output = ModelInferRequest::InferRequestedOutputTensor;
  RequestParts parts;
  std::string& head = parts.head;
  head.reserve(kUsualBytes);
  wire::AppendBytesField(ModelInferRequest::kModelNameFieldNumber, request.model, head);
  if (!request.id.empty()) {
    wire::AppendBytesField(ModelInferRequest::kIdFieldNumber, request.id, head);
  }
  constexpr int kParameters = ModelInferRequest::kParametersFieldNumber;
  if (request.layer) AppendParameter(kParameters, "layer", IntValue(*request.layer), head);
  if (request.trace) AppendParameter(kParameters, "epserve_trace", BoolValue(true), head);
  EPC_RETURN_IF_ERROR(AddInput(kHiddenStates, request.hidden_states, parts));
  if (request.topk_ids) {
    EPC_RETURN_IF_ERROR(AddInput("topk_ids", *request.topk_ids, parts));
    EPC_RETURN_IF_ERROR(AddInput("topk_weights", *request.topk_weights, parts));
  }
  std::string output;
  wire::AppendBytesField(Output::kNameFieldNumber, kHiddenStates, output);
  if (request.output_place) {
    AppendPlace(Output::kParametersFieldNumber, *request.output_place,
                SizeBytes(request.hidden_states), output);
  }
  wire::AppendBytesField(ModelInferRequest::kOutputsFieldNumber, output, head);
  return parts;
}

ExpectedOutput ExpectedOf(const InferRequest& request) {
  return {request.hidden_states.shape, request.hidden_states.type, request.output_place};
}

namespace {

absl::StatusOr<InferResult> FromMessage(const ExpectedOutput& expected,
                                        const inference::ModelInferResponse& message,
                                        std::vector<TensorBytes> raw) {
  InferResult result;
  result.id = message.id();
  if (message.outputs_size() != 1 || raw.size() != 1 ||
      message.outputs(0).name() != kHiddenStates) {
    return absl::InternalError(absl::StrCat("infer: the answer has ", message.outputs_size(),
                                            " outputs and ", raw.size(),
                                            " contents, not one 'hidden_states'"));
  }
  const auto& output = message.outputs(0);
  result.hidden_states.shape.assign(output.shape().begin(), output.shape().end());
  const auto type = FromKserveName(output.datatype());
  if (!type || *type != expected.type || result.hidden_states.shape != expected.shape) {
    return absl::InternalError(absl::StrCat(
        "infer: the answer is ", output.datatype(), " ", ShapeString(result.hidden_states.shape),
        ", not ", KserveName(expected.type), " ", ShapeString(expected.shape)));
  }
  result.hidden_states.type = *type;
  result.hidden_states.bytes = std::move(raw.front());
  result.hidden_states.place = expected.place;
  const std::size_t expected_bytes = expected.place ? 0 : SizeBytes(result.hidden_states);
  if (result.hidden_states.bytes.size() != expected_bytes) {
    return absl::InternalError(absl::StrCat("infer: the answer has ",
                                            result.hidden_states.bytes.size(), " bytes, not ",
                                            expected_bytes));
  }
  for (const auto& [name, value] : message.parameters()) {
    if (value.parameter_choice_case() == inference::InferParameter::kInt64Param) {
      result.parameters[name] = value.int64_param();
    } else if (name == "epserve_trace") {
      result.trace = value.string_param();
    }
  }
  return result;
}

absl::Status StreamError(const inference::ModelStreamInferResponse& message) {
  const auto& parameters = message.infer_response().parameters();
  const auto found = parameters.find("epserve_error_code");
  const std::int64_t code = found == parameters.end() ? 0 : found->second.int64_param();
  const bool known = code > 0 && code <= static_cast<int>(absl::StatusCode::kUnauthenticated);
  std::optional<std::string> pushback_ms;
  if (const auto given = parameters.find(kStreamPushbackKey); given != parameters.end()) {
    pushback_ms = absl::StrCat(given->second.int64_param());
  }
  return WithPushback(
      absl::Status(known ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kUnknown,
                   message.error_message()),
      pushback_ms);
}

}  // namespace

absl::StatusOr<InferResult> ResultOf(const ExpectedOutput& expected, grpc::ByteBuffer&& reply,
                                     TensorBytes spare) {
  if (auto result = PlainResultOf(expected, reply, ReplyForm::kUnary, spare)) {
    reply.Clear();
    return *std::move(result);
  }
  ResponseParts parts;
  EPC_RETURN_IF_ERROR(Parse(std::move(reply), std::move(spare), &parts));
  return FromMessage(expected, parts.message, std::move(parts.raw));
}

absl::StatusOr<InferResult> StreamedResultOf(const ExpectedOutput& expected,
                                             grpc::ByteBuffer&& reply, TensorBytes spare) {
  if (auto result = PlainResultOf(expected, reply, ReplyForm::kStreamed, spare)) {
    reply.Clear();
    return *std::move(result);
  }
  StreamedParts parts;
  EPC_RETURN_IF_ERROR(Parse(std::move(reply), std::move(spare), &parts));
  if (!parts.message.error_message().empty()) return StreamError(parts.message);
  return FromMessage(expected, parts.message.infer_response(), std::move(parts.raw));
}

}  // namespace epserve::client
