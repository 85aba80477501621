#include "server/coordinator/front_door/plain_request.h"

#include <algorithm>
#include <utility>

#include "proto/wire/plain_fields.h"
#include "server/coordinator/front_door/request_fields.h"

namespace epserve::coordinator {
namespace {

using wire::BytesTag;
using wire::Fixed64Tag;
using wire::PlainFields;
using wire::VarintTag;

// Text of a field that may be there once, told by `seen`.
void ReadText(PlainFields& fields, std::string_view& text, bool& seen) {
  text = fields.Text();
  if (std::exchange(seen, true)) fields.Fail();
}

bool ReadPlainValue(std::string_view bytes, ParameterView::Value& value) {
  PlainFields fields(bytes);
  if (fields.done()) return false;
  switch (fields.Tag()) {
    case VarintTag(ParameterField::kBool):
      value = fields.Varint() != 0;
      break;
    case VarintTag(ParameterField::kInt64):
      value = static_cast<std::int64_t>(fields.Varint());
      break;
    case BytesTag(ParameterField::kString):
      value = fields.Text();
      break;
    case Fixed64Tag(ParameterField::kDouble):
      value = fields.Fixed64AsDouble();
      break;
    case VarintTag(ParameterField::kUint64):
      value = fields.Varint();
      break;
    default:
      return false;
  }
  return !fields.failed() && fields.done();
}

// An entry of a map of parameters.
bool ReadPlainParameter(std::string_view bytes, std::vector<ParameterView>& parameters) {
  PlainFields fields(bytes);
  ParameterView parameter;
  bool has_name = false;
  bool has_value = false;
  while (!fields.done()) {
    switch (fields.Tag()) {
      case BytesTag(EntryField::kName):
        ReadText(fields, parameter.name, has_name);
        break;
      case BytesTag(EntryField::kValue):
        if (has_value || !ReadPlainValue(fields.Bytes(), parameter.value)) return false;
        has_value = true;
        break;
      default:
        return false;
    }
  }
  const bool again = std::any_of(parameters.begin(), parameters.end(),
                                 [&](const auto& other) { return other.name == parameter.name; });
  if (fields.failed() || !has_name || !has_value || again) return false;
  parameters.push_back(parameter);
  return true;
}

bool ReadPlainShape(std::string_view bytes, PlainShapes& shapes,
                    std::span<const std::int64_t>& shape) {
  PlainFields fields(bytes);
  const std::size_t first = shapes.num_dims;
  while (!fields.done()) {
    if (shapes.num_dims == shapes.dims.size()) return false;
    shapes.dims[shapes.num_dims++] = static_cast<std::int64_t>(fields.Varint());
  }
  shape = std::span<const std::int64_t>(shapes.dims).subspan(first, shapes.num_dims - first);
  return !fields.failed();
}

// `num_parameters` counts those of all tensors.
bool ReadPlainInput(std::string_view bytes, const RequestLimits& limits,
                    std::size_t& num_parameters, PlainShapes& shapes, InputView& input) {
  PlainFields fields(bytes);
  bool has_name = false;
  bool has_type = false;
  bool has_shape = false;
  while (!fields.done()) {
    switch (fields.Tag()) {
      case BytesTag(InputField::kName):
        ReadText(fields, input.name, has_name);
        break;
      case BytesTag(InputField::kDatatype):
        ReadText(fields, input.datatype, has_type);
        break;
      case BytesTag(InputField::kShape):
        if (has_shape || !ReadPlainShape(fields.Bytes(), shapes, input.shape)) return false;
        has_shape = true;
        break;
      case BytesTag(InputField::kParameters):
        if (++num_parameters > limits.max_parameters) return false;
        if (!ReadPlainParameter(fields.Bytes(), input.parameters)) return false;
        break;
      default:
        return false;
    }
  }
  return !fields.failed();
}

bool ReadPlainOutput(std::string_view bytes, const RequestLimits& limits,
                     std::size_t& num_parameters, OutputView& output) {
  PlainFields fields(bytes);
  bool has_name = false;
  while (!fields.done()) {
    switch (fields.Tag()) {
      case BytesTag(OutputField::kName):
        ReadText(fields, output.name, has_name);
        break;
      case BytesTag(OutputField::kParameters):
        if (++num_parameters > limits.max_parameters) return false;
        if (!ReadPlainParameter(fields.Bytes(), output.parameters)) return false;
        break;
      default:
        return false;
    }
  }
  return !fields.failed();
}

}  // namespace

bool ReadPlainRequest(std::string_view bytes, const RequestLimits& limits, PlainShapes& shapes,
                      RequestView& view, std::string_view& id) {
  constexpr std::size_t kUsualInputs = 3;
  view.inputs.reserve(kUsualInputs);
  view.raw_contents.reserve(kUsualInputs);
  PlainFields fields(bytes);
  std::size_t num_tensor_parameters = 0;
  bool has_name = false;
  bool has_version = false;
  bool has_id = false;
  while (!fields.done()) {
    switch (fields.Tag()) {
      case BytesTag(RequestField::kModelName):
        ReadText(fields, view.model_name, has_name);
        break;
      case BytesTag(RequestField::kModelVersion):
        ReadText(fields, view.model_version, has_version);
        break;
      case BytesTag(RequestField::kId):
        ReadText(fields, id, has_id);
        break;
      case BytesTag(RequestField::kParameters):
        if (view.parameters.size() == limits.max_parameters) return false;
        if (!ReadPlainParameter(fields.Bytes(), view.parameters)) return false;
        break;
      case BytesTag(RequestField::kInputs):
        if (view.inputs.size() == limits.max_inputs) return false;
        if (!ReadPlainInput(fields.Bytes(), limits, num_tensor_parameters, shapes,
                            view.inputs.emplace_back())) {
          return false;
        }
        break;
      case BytesTag(RequestField::kOutputs):
        if (view.outputs.size() == limits.max_outputs) return false;
        if (!ReadPlainOutput(fields.Bytes(), limits, num_tensor_parameters,
                             view.outputs.emplace_back())) {
          return false;
        }
        break;
      case BytesTag(RequestField::kRawContents):
        if (view.raw_contents.size() == limits.max_inputs) return false;
        view.raw_contents.emplace_back(fields.Bytes());
        break;
      default:
        return false;
    }
  }
  return !fields.failed();
}

}  // namespace epserve::coordinator
