#include "server/coordinator/front_door/plain_request.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace epserve::coordinator {
namespace {

// Tags of one byte: a field's number and how its value is written.
constexpr std::uint8_t VarintTag(int field) { return static_cast<std::uint8_t>(field << 3); }
constexpr std::uint8_t Fixed64Tag(int field) { return static_cast<std::uint8_t>(field << 3 | 1); }
constexpr std::uint8_t BytesTag(int field) { return static_cast<std::uint8_t>(field << 3 | 2); }

// A message's bytes, from its next field on. Once something was not plain, `failed` stays.
class PlainFields {
 public:
  explicit PlainFields(std::string_view bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}

  bool failed() const { return failed_; }
  bool done() const { return failed_ || at_ == end_; }

  std::uint8_t Tag() { return static_cast<std::uint8_t>(*at_++); }  // REQUIRES: !done()

  std::uint64_t Varint() {
    std::uint64_t number = 0;
    for (int shift = 0; shift < 64 && at_ != end_; shift += 7) {
      const auto byte = static_cast<std::uint8_t>(*at_++);
      if (shift == 63 && byte > 1) break;
      number |= std::uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return number;
    }
    Fail();
    return 0;
  }

  double Fixed64AsDouble() {
    static_assert(std::endian::native == std::endian::little);
    double value = 0;
    if (end_ - at_ < static_cast<std::ptrdiff_t>(sizeof(value))) return Fail(), value;
    std::memcpy(&value, at_, sizeof(value));
    at_ += sizeof(value);
    return value;
  }

  std::string_view Bytes() {
    const char* const begin = at_;
    const std::uint64_t size = Varint();
    // The library takes lengths of five bytes at most; these are shorter, and plain.
    if (failed_ || at_ - begin > 4 || size > static_cast<std::uint64_t>(end_ - at_)) {
      return Fail(), std::string_view();
    }
    at_ += size;
    return {at_ - size, static_cast<std::size_t>(size)};
  }

  // Text of a field that may be there once, told by `seen`. The library looks for valid UTF-8,
  // which ASCII is.
  void Text(std::string_view& text, bool& seen) {
    text = Bytes();
    const bool ascii = std::all_of(text.begin(), text.end(),
                                   [](char c) { return static_cast<unsigned char>(c) < 0x80; });
    if (seen || !ascii) Fail();
    seen = true;
  }

  void Fail() { failed_ = true; }

 private:
  const char* at_;
  const char* const end_;
  bool failed_ = false;
};

bool ReadPlainValue(std::string_view bytes, ParameterView::Value& value) {
  PlainFields fields(bytes);
  if (fields.done()) return false;
  switch (fields.Tag()) {
    case VarintTag(1):
      value = fields.Varint() != 0;
      break;
    case VarintTag(2):
      value = static_cast<std::int64_t>(fields.Varint());
      break;
    case BytesTag(3): {
      bool seen = false;
      std::string_view text;
      fields.Text(text, seen);
      value = text;
      break;
    }
    case Fixed64Tag(4):
      value = fields.Fixed64AsDouble();
      break;
    case VarintTag(5):
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
      case BytesTag(1):
        fields.Text(parameter.name, has_name);
        break;
      case BytesTag(2):
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
      case BytesTag(1):
        fields.Text(input.name, has_name);
        break;
      case BytesTag(2):
        fields.Text(input.datatype, has_type);
        break;
      case BytesTag(3):
        if (has_shape || !ReadPlainShape(fields.Bytes(), shapes, input.shape)) return false;
        has_shape = true;
        break;
      case BytesTag(4):
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
      case BytesTag(1):
        fields.Text(output.name, has_name);
        break;
      case BytesTag(2):
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
      case BytesTag(1):
        fields.Text(view.model_name, has_name);
        break;
      case BytesTag(2):
        fields.Text(view.model_version, has_version);
        break;
      case BytesTag(3):
        fields.Text(id, has_id);
        break;
      case BytesTag(4):
        if (view.parameters.size() == limits.max_parameters) return false;
        if (!ReadPlainParameter(fields.Bytes(), view.parameters)) return false;
        break;
      case BytesTag(5):
        if (view.inputs.size() == limits.max_inputs) return false;
        if (!ReadPlainInput(fields.Bytes(), limits, num_tensor_parameters, shapes,
                            view.inputs.emplace_back())) {
          return false;
        }
        break;
      case BytesTag(6):
        if (view.outputs.size() == limits.max_outputs) return false;
        if (!ReadPlainOutput(fields.Bytes(), limits, num_tensor_parameters,
                             view.outputs.emplace_back())) {
          return false;
        }
        break;
      case BytesTag(7):
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
