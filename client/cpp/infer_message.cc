#include "client/cpp/infer_message.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

using Parameters = google::protobuf::Map<std::string, inference::InferParameter>;

void SetPlace(const RegionPlace& place, std::uint64_t size_bytes, Parameters* parameters) {
  (*parameters)["shared_memory_region"].set_string_param(place.region);
  (*parameters)["shared_memory_byte_size"].set_int64_param(static_cast<std::int64_t>(size_bytes));
  (*parameters)["shared_memory_offset"].set_int64_param(
      static_cast<std::int64_t>(place.offset_bytes));
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
  auto* input = parts.message.add_inputs();
  input->set_name(name);
  input->set_datatype(datatype);
  for (const std::int64_t size : tensor.shape) input->add_shape(size);
  if (placed) {
    SetPlace(*tensor.place, SizeBytes(tensor), input->mutable_parameters());
  } else {
    parts.raw.push_back(tensor.bytes);
  }
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
  RequestParts parts;
  inference::ModelInferRequest& message = parts.message;
  message.set_model_name(request.model);
  message.set_id(request.id);
  if (request.layer) (*message.mutable_parameters())["layer"].set_int64_param(*request.layer);
  if (request.trace) (*message.mutable_parameters())["epserve_trace"].set_bool_param(true);
  EPC_RETURN_IF_ERROR(AddInput(kHiddenStates, request.hidden_states, parts));
  if (request.topk_ids) {
    EPC_RETURN_IF_ERROR(AddInput("topk_ids", *request.topk_ids, parts));
    EPC_RETURN_IF_ERROR(AddInput("topk_weights", *request.topk_weights, parts));
  }
  auto* output = message.add_outputs();
  output->set_name(kHiddenStates);
  if (request.output_place) {
    SetPlace(*request.output_place, SizeBytes(request.hidden_states), output->mutable_parameters());
  }
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
  return absl::Status(known ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kUnknown,
                      message.error_message());
}

}  // namespace

absl::StatusOr<InferResult> ResultOf(const ExpectedOutput& expected, grpc::ByteBuffer&& reply,
                                     TensorBytes spare) {
  ResponseParts parts;
  EPC_RETURN_IF_ERROR(Parse(std::move(reply), std::move(spare), &parts));
  return FromMessage(expected, parts.message, std::move(parts.raw));
}

absl::StatusOr<InferResult> StreamedResultOf(const ExpectedOutput& expected,
                                             grpc::ByteBuffer&& reply, TensorBytes spare) {
  StreamedParts parts;
  EPC_RETURN_IF_ERROR(Parse(std::move(reply), std::move(spare), &parts));
  if (!parts.message.error_message().empty()) return StreamError(parts.message);
  return FromMessage(expected, parts.message.infer_response(), std::move(parts.raw));
}

}  // namespace epserve::client
