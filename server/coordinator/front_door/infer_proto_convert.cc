#include "server/coordinator/front_door/infer_proto_convert.h"

#include <google/protobuf/repeated_field.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/slice.h>

#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "inference/grpc_service.pb.h"
#include "proto/wire/wire_text.h"
#include "runtime/base/status.h"
#include "server/common/grpc_status.h"
#include "server/coordinator/front_door/message_split.h"
#include "server/coordinator/front_door/plain_request.h"
#include "server/coordinator/front_door/request_bounds.h"
#include "server/coordinator/front_door/request_fields.h"
#include "server/coordinator/front_door/request_validation.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using inference::ModelInferResponse;

// What request_fields.h says. An entry of a map has the same two numbers in every message.
static_assert(RequestField::kModelName == ModelInferRequest::kModelNameFieldNumber);
static_assert(RequestField::kModelVersion == ModelInferRequest::kModelVersionFieldNumber);
static_assert(RequestField::kId == ModelInferRequest::kIdFieldNumber);
static_assert(RequestField::kParameters == ModelInferRequest::kParametersFieldNumber);
static_assert(RequestField::kInputs == ModelInferRequest::kInputsFieldNumber);
static_assert(RequestField::kOutputs == ModelInferRequest::kOutputsFieldNumber);
static_assert(RequestField::kRawContents == ModelInferRequest::kRawInputContentsFieldNumber);
using Input = ModelInferRequest::InferInputTensor;
static_assert(InputField::kName == Input::kNameFieldNumber);
static_assert(InputField::kDatatype == Input::kDatatypeFieldNumber);
static_assert(InputField::kShape == Input::kShapeFieldNumber);
static_assert(InputField::kParameters == Input::kParametersFieldNumber);
static_assert(InputField::kContents == Input::kContentsFieldNumber);
using RequestedOutput = ModelInferRequest::InferRequestedOutputTensor;
static_assert(OutputField::kName == RequestedOutput::kNameFieldNumber);
static_assert(OutputField::kParameters == RequestedOutput::kParametersFieldNumber);
using Contents = inference::InferTensorContents;
static_assert(ContentsField::kInt32 == Contents::kIntContentsFieldNumber);
static_assert(ContentsField::kInt64 == Contents::kInt64ContentsFieldNumber);
static_assert(ContentsField::kFp32 == Contents::kFp32ContentsFieldNumber);
static_assert(ContentsField::kBytes == Contents::kBytesContentsFieldNumber);
using Parameter = inference::InferParameter;
static_assert(ParameterField::kBool == Parameter::kBoolParamFieldNumber);
static_assert(ParameterField::kInt64 == Parameter::kInt64ParamFieldNumber);
static_assert(ParameterField::kString == Parameter::kStringParamFieldNumber);
static_assert(ParameterField::kDouble == Parameter::kDoubleParamFieldNumber);
static_assert(ParameterField::kUint64 == Parameter::kUint64ParamFieldNumber);

// Outputs up to this size are copied into one piece with the rest of the reply, which is then sent
// as one.
constexpr std::size_t kCopiedOutputBytes = 16 << 10;

absl::Status Malformed() {
  return absl::InvalidArgumentError("infer: the message is not a ModelInferRequest");
}

ParameterView ViewOf(std::string_view name, const inference::InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kBoolParam:
      return {name, parameter.bool_param()};
    case inference::InferParameter::kInt64Param:
      return {name, std::int64_t{parameter.int64_param()}};
    case inference::InferParameter::kStringParam:
      return {name, std::string_view(parameter.string_param())};
    case inference::InferParameter::kDoubleParam:
      return {name, parameter.double_param()};
    case inference::InferParameter::kUint64Param:
      return {name, std::uint64_t{parameter.uint64_param()}};
    case inference::InferParameter::PARAMETER_CHOICE_NOT_SET:
      break;
  }
  return {name, std::monostate()};
}

template <typename Map>
std::vector<ParameterView> ViewsOf(const Map& parameters) {
  std::vector<ParameterView> views;
  views.reserve(parameters.size());
  for (const auto& [name, value] : parameters) views.push_back(ViewOf(name, value));
  return views;
}

template <typename T>
std::string_view BytesOf(const google::protobuf::RepeatedField<T>& elements) {
  return {reinterpret_cast<const char*>(elements.data()),
          static_cast<std::size_t>(elements.size()) * sizeof(T)};
}

// A tensor has `size` elements in its field of `kind`.
void AddTyped(TypedKind kind, std::size_t size, RawView bytes, InputView& view) {
  if (size == 0) return;
  const bool first = view.typed_kind == TypedKind::kNone;
  view.typed_kind = first ? kind : TypedKind::kSeveral;
  view.typed_bytes = first ? std::move(bytes) : RawView();
}

void ViewTypedContents(const inference::InferTensorContents& contents, InputView& view) {
  const auto found = [&view](TypedKind kind, int size, std::string_view bytes) {
    AddTyped(kind, static_cast<std::size_t>(size), bytes, view);
  };
  found(TypedKind::kBool, contents.bool_contents_size(), {});
  found(TypedKind::kInt32, contents.int_contents_size(), BytesOf(contents.int_contents()));
  found(TypedKind::kInt64, contents.int64_contents_size(), BytesOf(contents.int64_contents()));
  found(TypedKind::kUint32, contents.uint_contents_size(), {});
  found(TypedKind::kUint64, contents.uint64_contents_size(), {});
  found(TypedKind::kFp32, contents.fp32_contents_size(), BytesOf(contents.fp32_contents()));
  found(TypedKind::kFp64, contents.fp64_contents_size(), {});
  found(TypedKind::kBytes, contents.bytes_contents_size(), {});
}

RequestView ViewOf(const ModelInferRequest& message) {
  RequestView view;
  view.model_name = message.model_name();
  view.model_version = message.model_version();
  view.parameters = ViewsOf(message.parameters());
  for (const auto& input : message.inputs()) {
    InputView& tensor = view.inputs.emplace_back();
    tensor.name = input.name();
    tensor.datatype = input.datatype();
    // The protocol's int64 and this platform's are one type.
    tensor.shape = std::span<const std::int64_t>(input.shape().data(), input.shape_size());
    tensor.parameters = ViewsOf(input.parameters());
    ViewTypedContents(input.contents(), tensor);
  }
  for (const auto& output : message.outputs()) {
    view.outputs.push_back({output.name(), ViewsOf(output.parameters())});
  }
  view.raw_contents.reserve(static_cast<std::size_t>(message.raw_input_contents_size()));
  for (const std::string& raw : message.raw_input_contents()) {
    view.raw_contents.emplace_back(std::string_view(raw));
  }
  return view;
}

// What a request's views point into.
struct RequestParts {
  std::vector<grpc::Slice> slices;           // of the large fields, where there are any
  std::string bytes;                         // of the rest, where that is plain
  PlainShapes shapes;                        // likewise
  std::optional<ModelInferRequest> message;  // of the rest, where it is not
};

absl::StatusOr<InferRequestMessage> ParseWhole(const grpc::ByteBuffer& bytes) {
  const auto message = std::make_shared<ModelInferRequest>();
  grpc::ByteBuffer shared(bytes);  // Counts references; copies no bytes.
  grpc::ProtoBufferReader reader(&shared);
  if (!message->ParseFromZeroCopyStream(&reader)) return Malformed();
  return InferRequestMessage{message, message->id(), ViewOf(*message)};
}

// Puts what was cut out of a message into the view of its rest. Both count entries and inputs
// alike; were it not so, nothing must be written elsewhere: false.
bool PutBack(const LargeField& field, RawView bytes, RequestView& view) {
  if (field.kind == LargeField::Kind::kRawContents) {
    if (field.index >= view.raw_contents.size()) return false;
    view.raw_contents[field.index] = std::move(bytes);
    return true;
  }
  if (field.index >= view.inputs.size()) return false;
  AddTyped(TypedKind::kFp32, field.size(), std::move(bytes), view.inputs[field.index]);
  return true;
}

const char* WireDataType(runtime::DataType type) {
  switch (type) {
    case runtime::DataType::kBf16:
      return "BF16";
    case runtime::DataType::kFp16:
      return "FP16";
    default:
      return "FP32";  // A validated request has no other.
  }
}

// What a timeline is drawn from: when the batch went out, how its count matrix was made and what
// that took, and each worker's phases one after another; JSON, times on the monotonic clock.
std::string TraceOf(const InferTimes& times) {
  std::string text =
      absl::StrCat("{\"started_us\":", times.started_us, ",\"count_exchange\":\"",
                   times.count_exchange, "\",\"counts_ns\":", times.counts_ns, ",\"workers\":[");
  for (const RankTimes& of : times.ranks) {
    absl::StrAppend(&text, &of == times.ranks.data() ? "" : ",", "{\"rank\":", of.rank,
                    ",\"start_ns\":", of.start_ns);
    absl::StrAppend(&text, ",\"assign_ns\":", of.assign_ns, ",\"counts_ns\":", of.counts_ns,
                    ",\"dispatch_ns\":", of.dispatch_ns);
    absl::StrAppend(&text, ",\"ffn_ns\":", of.ffn_ns, ",\"combine_ns\":", of.combine_ns, "}");
  }
  return absl::StrCat(text, "]}");
}

// Begins an entry of the map that is the field `field`; a value of `value_bytes` is to follow.
void AppendEntryHead(int field, std::string_view name, std::size_t value_bytes, std::string& text) {
  wire::AppendFieldHead(field,
                        wire::FieldHeadBytes(name.size()) + name.size() +
                            wire::FieldHeadBytes(value_bytes) + value_bytes,
                        text);
  wire::AppendBytesField(EntryField::kName, name, text);
  wire::AppendFieldHead(EntryField::kValue, value_bytes, text);
}

void AppendParameter(int field, std::string_view name, std::int64_t value, std::string& text) {
  AppendEntryHead(field, name, 1 + wire::VarintBytes(static_cast<std::uint64_t>(value)), text);
  wire::AppendIntField(ParameterField::kInt64, value, text);
}

void AppendParameter(int field, std::string_view name, std::string_view value, std::string& text) {
  AppendEntryHead(field, name, wire::FieldHeadBytes(value.size()) + value.size(), text);
  wire::AppendBytesField(ParameterField::kString, value, text);
}

void AppendHead(const ServedModel& model, std::string_view id, std::string& text) {
  wire::AppendBytesField(ModelInferResponse::kModelNameFieldNumber, model.name, text);
  wire::AppendBytesField(ModelInferResponse::kModelVersionFieldNumber, model.version, text);
  wire::AppendBytesField(ModelInferResponse::kIdFieldNumber, id, text);
}

void AppendParameters(const InferReply& reply, std::string& text) {
  const auto append = [&text](std::string_view name, auto value) {
    AppendParameter(ModelInferResponse::kParametersFieldNumber, name, value, text);
  };
  append("epserve_queue_us", reply.times.queue_us);
  append("epserve_assign_us", reply.times.assign_us);
  append("epserve_counts_us", reply.times.counts_ns / 1000);
  append("epserve_dispatch_us", reply.times.dispatch_us);
  append("epserve_ffn_us", reply.times.ffn_us);
  append("epserve_combine_us", reply.times.combine_us);
  append("epserve_epoch", static_cast<std::int64_t>(reply.times.epoch));
  append("epserve_server_us", reply.server_us);
  if (reply.times.ranks.empty()) return;
  append("epserve_trace", std::string_view(TraceOf(reply.times)));
}

void AppendOutput(const ServedModel& model, const ValidatedRequest& request, std::string& text) {
  using Output = ModelInferResponse::InferOutputTensor;
  std::string output;
  wire::AppendBytesField(Output::kNameFieldNumber, kHiddenStates, output);
  wire::AppendBytesField(Output::kDatatypeFieldNumber, WireDataType(request.dtype), output);
  const auto rows = static_cast<std::uint64_t>(request.num_tokens);
  const auto columns = static_cast<std::uint64_t>(model.hidden);
  wire::AppendFieldHead(Output::kShapeFieldNumber,
                        wire::VarintBytes(rows) + wire::VarintBytes(columns), output);
  wire::AppendVarint(rows, output);
  wire::AppendVarint(columns, output);
  if (const RegionWindow& window = request.output; window.region != nullptr) {
    const auto append = [&output](std::string_view name, auto value) {
      AppendParameter(Output::kParametersFieldNumber, name, value, output);
    };
    append("shared_memory_region", std::string_view(window.region->info().name));
    append("shared_memory_byte_size", static_cast<std::int64_t>(request.output_bytes));
    append("shared_memory_offset", static_cast<std::int64_t>(window.offset_bytes));
  }
  wire::AppendBytesField(ModelInferResponse::kOutputsFieldNumber, output, text);
}

// One slice of these bytes, one piece after another.
grpc::Slice Joined(std::initializer_list<std::string_view> pieces) {
  std::size_t size = 0;
  for (const std::string_view piece : pieces) size += piece.size();
  grpc_slice joined = grpc_slice_malloc(size);
  std::uint8_t* to = GRPC_SLICE_START_PTR(joined);
  for (const std::string_view piece : pieces) {
    if (!piece.empty()) std::memcpy(to, piece.data(), piece.size());
    to += piece.size();
  }
  return grpc::Slice(joined, grpc::Slice::STEAL_REF);
}

// The response `text` with `output` as its raw entry, which stays where it is if it is large. The
// raw entries are a response's last field, and the response a stream's message's only one.
absl::StatusOr<ReplyBytes> WithOutput(std::string text, InferForm form, OutputBytes output) {
  wire::AppendFieldHead(ModelInferResponse::kRawOutputContentsFieldNumber, output.size(), text);
  const std::uint64_t response_bytes = std::uint64_t{text.size()} + output.size();
  if (response_bytes > std::numeric_limits<std::int32_t>::max()) {
    return absl::InternalError(absl::StrCat("infer: the reply of ", output.size(),
                                            " output bytes passes the 2 GiB of a message"));
  }
  std::string outer;
  if (form == InferForm::kStream) {
    wire::AppendFieldHead(inference::ModelStreamInferResponse::kInferResponseFieldNumber,
                          response_bytes, outer);
  }
  if (output.size() <= kCopiedOutputBytes) {
    const grpc::Slice slice =
        Joined({outer, text, std::string_view(output.bytes().data(), output.size())});
    return std::make_unique<const grpc::ByteBuffer>(&slice, 1);
  }
  const grpc::Slice slices[] = {Joined({outer, text}), output.Release()};
  return std::make_unique<const grpc::ByteBuffer>(slices, std::size(slices));
}

}  // namespace

absl::StatusOr<InferRequestMessage> ParseInferRequest(const grpc::ByteBuffer& bytes,
                                                      const RequestLimits& limits) {
  if (!bytes.Valid()) return Malformed();
  const bool large = bytes.Length() >= limits.large_entry_bytes;
  RequestOutline outline;
  if (large) {
    EPS_ASSIGN_OR_RETURN(outline, CheckRequestBounds(bytes, limits));
    // Most of it is elements, then, and the parser takes them from where they are.
    if (outline.raw_contents == 0 && outline.large.empty()) return ParseWhole(bytes);
  }
  const auto parts = std::make_shared<RequestParts>();
  if (!bytes.Dump(&parts->slices).ok()) return Malformed();
  SplitMessage split = SplitLargeFields(parts->slices, outline.large);
  // The slices are parts of larger buffers of gRPC's, which they would keep.
  if (split.large.empty()) parts->slices.clear();

  InferRequestMessage result;
  parts->bytes = std::move(split.rest);
  if (!ReadPlainRequest(parts->bytes, limits, parts->shapes, result.view, result.id)) {
    if (!large) EPS_RETURN_IF_ERROR(CheckRequestBounds(bytes, limits).status());
    if (!parts->message.emplace().ParseFromString(parts->bytes)) return Malformed();
    parts->bytes = std::string();
    result.view = ViewOf(*parts->message);
    result.id = parts->message->id();
  }
  for (std::size_t i = 0; i < split.large.size(); ++i) {
    if (!PutBack(outline.large[i], std::move(split.large[i]), result.view)) return Malformed();
  }
  result.owner = parts;
  return result;
}

absl::StatusOr<ReplyBytes> SerializeInferReply(const ServedModel& model, InferForm form,
                                               InferReply reply) {
  constexpr std::size_t kUsualBytes = 512;
  std::string text;
  text.reserve(kUsualBytes);
  AppendHead(model, reply.id, text);
  AppendParameters(reply, text);
  AppendOutput(model, *reply.request, text);
  return WithOutput(std::move(text), form, std::move(reply.output));
}

ReplyBytes SerializeStreamError(const ServedModel& model, std::string_view id,
                                const absl::Status& status, std::int64_t retry_pushback_ms) {
  using Response = inference::ModelStreamInferResponse;
  std::string response;
  AppendHead(model, id, response);
  // A stream's errors are text alone in this protocol; callers that know us get the code too.
  AppendParameter(ModelInferResponse::kParametersFieldNumber, "epserve_error_code",
                  static_cast<std::int64_t>(status.code()), response);
  if (retry_pushback_ms > 0) {
    AppendParameter(ModelInferResponse::kParametersFieldNumber, "epserve_retry_pushback_ms",
                    retry_pushback_ms, response);
  }
  std::string text;
  wire::AppendBytesField(Response::kErrorMessageFieldNumber,
                         server::ToGrpcStatus(status).error_message(), text);
  wire::AppendBytesField(Response::kInferResponseFieldNumber, response, text);
  const grpc::Slice slice(text);
  return std::make_unique<const grpc::ByteBuffer>(&slice, 1);
}

}  // namespace epserve::coordinator
