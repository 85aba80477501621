#include "server/coordinator/front_door/infer_proto_convert.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/repeated_field.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <iterator>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "inference/grpc_service.pb.h"
#include "runtime/base/status.h"
#include "server/coordinator/front_door/message_split.h"
#include "server/coordinator/front_door/request_validation.h"
#include "server/coordinator/front_door/shm_registry.h"
#include "server/rpc/messages.h"

namespace epserve::coordinator {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using inference::ModelInferRequest;
using inference::ModelInferResponse;

// Outputs up to this size are copied into one piece with the rest of the reply, which is then sent
// as one.
constexpr std::size_t kCopiedOutputBytes = 16 << 10;

absl::Status Malformed() {
  return absl::InvalidArgumentError("infer: the message is not a ModelInferRequest");
}

// What a message holds, counted before anything is allocated for it.
struct FieldCounts {
  std::size_t inputs = 0;
  std::size_t outputs = 0;
  std::size_t raw_contents = 0;
  std::size_t request_parameters = 0;
  std::size_t tensor_parameters = 0;  // over all tensors
  std::size_t strings = 0;            // elements of bytes_contents, over all tensors
};

// Calls on_field(number, stream) for each length-delimited field up to the stream's limit; on_field
// need not read the field to its end. False for bytes that are no message.
template <typename OnField>
bool ForEachDelimited(CodedInputStream* stream, const OnField& on_field) {
  while (const std::uint32_t tag = stream->ReadTag()) {
    if (WireFormatLite::GetTagWireType(tag) != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
      if (!WireFormatLite::SkipField(stream, tag)) return false;
      continue;
    }
    int length = 0;
    if (!stream->ReadVarintSizeAsInt(&length)) return false;
    const int outer = stream->BytesUntilLimit();
    if (outer >= 0 && length > outer) return false;
    const auto limit = stream->PushLimit(length);
    if (!on_field(WireFormatLite::GetTagFieldNumber(tag), stream)) return false;
    if (!stream->Skip(stream->BytesUntilLimit())) return false;
    stream->PopLimit(limit);
  }
  return stream->ConsumedEntireMessage();
}

bool CountFields(CodedInputStream* stream, FieldCounts& counts) {
  const auto leave = [](int, CodedInputStream*) { return true; };
  const auto count_strings = [&](int field, CodedInputStream*) {
    counts.strings += field == inference::InferTensorContents::kBytesContentsFieldNumber;
    return true;
  };
  const auto count_input = [&](int field, CodedInputStream* nested) {
    counts.tensor_parameters +=
        field == ModelInferRequest::InferInputTensor::kParametersFieldNumber;
    if (field != ModelInferRequest::InferInputTensor::kContentsFieldNumber) return true;
    return ForEachDelimited(nested, count_strings);
  };
  const auto count_output = [&](int field, CodedInputStream*) {
    counts.tensor_parameters +=
        field == ModelInferRequest::InferRequestedOutputTensor::kParametersFieldNumber;
    return true;
  };
  return ForEachDelimited(stream, [&](int field, CodedInputStream* nested) {
    switch (field) {
      case ModelInferRequest::kParametersFieldNumber:
        ++counts.request_parameters;
        return leave(field, nested);
      case ModelInferRequest::kInputsFieldNumber:
        ++counts.inputs;
        return ForEachDelimited(nested, count_input);
      case ModelInferRequest::kOutputsFieldNumber:
        ++counts.outputs;
        return ForEachDelimited(nested, count_output);
      case ModelInferRequest::kRawInputContentsFieldNumber:
        ++counts.raw_contents;
        return leave(field, nested);
      default:
        return leave(field, nested);
    }
  });
}

absl::Status CheckCounts(CodedInputStream& stream, const RequestLimits& limits) {
  FieldCounts counts;
  if (!CountFields(&stream, counts)) return Malformed();
  struct Bound {
    const char* what;
    std::size_t got;
    std::size_t limit;
  };
  const Bound bounds[] = {
      {"inputs", counts.inputs, limits.max_inputs},
      {"outputs", counts.outputs, limits.max_outputs},
      {"raw_input_contents entries", counts.raw_contents, limits.max_inputs},
      {"parameters", counts.request_parameters, limits.max_parameters},
      {"tensor parameters", counts.tensor_parameters, limits.max_parameters},
      {"bytes_contents entries", counts.strings, limits.max_inputs},
  };
  for (const Bound& bound : bounds) {
    if (bound.got > bound.limit) {
      return absl::InvalidArgumentError(absl::StrCat("infer: request has ", bound.got, " ",
                                                     bound.what, ", more than the limit of ",
                                                     bound.limit));
    }
  }
  return absl::OkStatus();
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
std::span<const char> BytesOf(const google::protobuf::RepeatedField<T>& elements) {
  return {reinterpret_cast<const char*>(elements.data()),
          static_cast<std::size_t>(elements.size()) * sizeof(T)};
}

void ViewTypedContents(const inference::InferTensorContents& contents, InputView& view) {
  const auto found = [&view](TypedKind kind, int size, std::span<const char> bytes) {
    if (size == 0) return;
    view.typed_bytes = view.typed_kind == TypedKind::kNone ? bytes : std::span<const char>();
    view.typed_kind = view.typed_kind == TypedKind::kNone ? kind : TypedKind::kSeveral;
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

// As ParseInferRequest, with the large raw entries left in the message's own slices.
absl::StatusOr<InferRequestMessage> ParseInPieces(const grpc::ByteBuffer& bytes,
                                                  const RequestLimits& limits) {
  struct Parts {
    std::vector<grpc::Slice> slices;
    ModelInferRequest message;
  };
  const auto parts = std::make_shared<Parts>();
  if (!bytes.Dump(&parts->slices).ok()) return Malformed();
  SplitMessage split = SplitLargeEntries(parts->slices, limits.large_entry_bytes);
  {
    CodedInputStream stream(reinterpret_cast<const std::uint8_t*>(split.rest.data()),
                            static_cast<int>(split.rest.size()));
    EPS_RETURN_IF_ERROR(CheckCounts(stream, limits));
  }
  if (!parts->message.ParseFromString(split.rest)) return Malformed();
  InferRequestMessage result;
  result.id = parts->message.id();
  result.view = ViewOf(parts->message);
  for (auto& [index, raw] : split.large) {
    // Both count the entries alike; were it not so, nothing must be written elsewhere.
    if (index >= result.view.raw_contents.size()) return Malformed();
    result.view.raw_contents[index] = std::move(raw);
  }
  result.owner = parts;
  return result;
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

void Head(const ServedModel& model, std::string_view id, ModelInferResponse& response) {
  response.set_model_name(model.name);
  response.set_model_version(model.version);
  response.set_id(std::string(id));
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

void SetParameters(const InferReply& reply, ModelInferResponse& response) {
  auto& parameters = *response.mutable_parameters();
  const auto set = [&parameters](const char* name, std::int64_t value) {
    parameters[name].set_int64_param(value);
  };
  set("epserve_queue_us", reply.times.queue_us);
  set("epserve_assign_us", reply.times.assign_us);
  set("epserve_counts_us", reply.times.counts_ns / 1000);
  set("epserve_dispatch_us", reply.times.dispatch_us);
  set("epserve_ffn_us", reply.times.ffn_us);
  set("epserve_combine_us", reply.times.combine_us);
  set("epserve_epoch", static_cast<std::int64_t>(reply.times.epoch));
  set("epserve_server_us", reply.server_us);
  if (!reply.times.ranks.empty()) {
    parameters["epserve_trace"].set_string_param(TraceOf(reply.times));
  }
}

void AppendNumber(std::uint64_t number, std::string& text) {
  for (; number >= 0x80; number >>= 7) text.push_back(static_cast<char>(number | 0x80));
  text.push_back(static_cast<char>(number));
}

// The tag and the length of a field of so many bytes.
std::string FieldHead(int field, std::uint64_t bytes) {
  std::string head;
  AppendNumber(static_cast<std::uint64_t>(field) << 3 | WireFormatLite::WIRETYPE_LENGTH_DELIMITED,
               head);
  AppendNumber(bytes, head);
  return head;
}

// The message's bytes with `output` as its raw entry, put together here, so that the entry stays
// where it is. The raw entries are the message's last field, and a stream's response its only one.
absl::StatusOr<grpc::ByteBuffer> WithOutput(const ModelInferResponse& response, InferForm form,
                                            OutputBytes output) {
  const std::string raw_head =
      FieldHead(ModelInferResponse::kRawOutputContentsFieldNumber, output.size());
  const std::uint64_t response_bytes =
      std::uint64_t{response.ByteSizeLong()} + raw_head.size() + output.size();
  if (response_bytes > std::numeric_limits<std::int32_t>::max()) {
    return absl::InternalError(absl::StrCat("infer: the reply of ", output.size(),
                                            " output bytes passes the 2 GiB of a message"));
  }
  std::string text;
  if (form == InferForm::kStream) {
    text =
        FieldHead(inference::ModelStreamInferResponse::kInferResponseFieldNumber, response_bytes);
  }
  if (!response.AppendToString(&text)) {
    return absl::InternalError("infer: the reply could not be written");
  }
  text += raw_head;
  if (output.size() <= kCopiedOutputBytes) {
    text.append(output.bytes().data(), output.size());
    const grpc::Slice slice(text);
    return grpc::ByteBuffer(&slice, 1);
  }
  const grpc::Slice slices[] = {grpc::Slice(text), output.Release()};
  return grpc::ByteBuffer(slices, std::size(slices));
}

}  // namespace

absl::StatusOr<InferRequestMessage> ParseInferRequest(const grpc::ByteBuffer& bytes,
                                                      const RequestLimits& limits) {
  if (!bytes.Valid()) return Malformed();
  if (bytes.Length() >= limits.large_entry_bytes) return ParseInPieces(bytes, limits);
  grpc::ByteBuffer shared(bytes);  // Counts references; copies no bytes.
  {
    grpc::ProtoBufferReader reader(&shared);
    if (!reader.status().ok()) return Malformed();
    CodedInputStream stream(&reader);
    EPS_RETURN_IF_ERROR(CheckCounts(stream, limits));
  }
  auto message = std::make_shared<ModelInferRequest>();
  if (!server::ParseMessage(bytes, message.get()).ok()) return Malformed();
  InferRequestMessage result;
  result.id = message->id();
  result.view = ViewOf(*message);
  result.owner = std::move(message);
  return result;
}

absl::StatusOr<grpc::ByteBuffer> SerializeInferReply(const ServedModel& model, InferForm form,
                                                     InferReply reply) {
  ModelInferResponse response;
  Head(model, reply.id, response);
  SetParameters(reply, response);
  auto* output = response.add_outputs();
  output->set_name(kHiddenStates);
  output->set_datatype(WireDataType(reply.request->dtype));
  output->add_shape(reply.request->num_tokens);
  output->add_shape(model.hidden);
  if (const auto& window = reply.request->output; window.region != nullptr) {
    auto& parameters = *output->mutable_parameters();
    parameters["shared_memory_region"].set_string_param(window.region->info().name);
    parameters["shared_memory_byte_size"].set_int64_param(
        static_cast<std::int64_t>(reply.request->output_bytes));
    parameters["shared_memory_offset"].set_int64_param(
        static_cast<std::int64_t>(window.offset_bytes));
  }
  return WithOutput(response, form, std::move(reply.output));
}

grpc::ByteBuffer SerializeStreamError(const ServedModel& model, std::string_view id,
                                      const absl::Status& status) {
  inference::ModelStreamInferResponse response;
  response.set_error_message(server::ToGrpcStatus(status).error_message());
  Head(model, id, *response.mutable_infer_response());
  // A stream's errors are text alone in this protocol; callers that know us get the code too.
  (*response.mutable_infer_response()->mutable_parameters())["epserve_error_code"].set_int64_param(
      static_cast<std::int64_t>(status.code()));
  grpc::ByteBuffer bytes;
  // Of a few hundred bytes; the library fails for messages of 2 GiB and more.
  (void)server::SerializeMessage(response, &bytes);
  return bytes;
}

}  // namespace epserve::coordinator
