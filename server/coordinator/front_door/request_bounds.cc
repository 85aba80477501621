#include "server/coordinator/front_door/request_bounds.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

// Fields of ModelInferRequest,
constexpr int kParameters = 4;
constexpr int kInputs = 5;
constexpr int kOutputs = 6;
constexpr int kRawContents = 7;
// of its tensors,
constexpr int kInputParameters = 4;
constexpr int kInputContents = 5;
constexpr int kOutputParameters = 2;
// of InferTensorContents,
constexpr int kIntContents = 2;
constexpr int kInt64Contents = 3;
constexpr int kFp32Contents = 6;
constexpr int kBytesContents = 8;
// and of an entry of a map of parameters.
constexpr int kEntryValue = 2;

// A negative number, such as the id of no expert.
constexpr std::size_t kMaxVarintBytes = 10;

// Typed elements are parsed on the thread that takes the workers' heartbeats, and five callers with
// 112 MiB of them each kept it for longer than a lease: they are for small requests.
constexpr std::size_t kMostTypedBytes = std::size_t{4} << 20;

// One look at one message.
class Bounds {
 public:
  Bounds(CodedInputStream* stream, const RequestLimits& limits)
      : stream_(stream), limits_(limits) {}

  absl::StatusOr<RequestCounts> Check() {
    if (CheckRequest()) return RequestCounts{raw_contents_};
    if (!refusal_.ok()) return refusal_;
    return absl::InvalidArgumentError("infer: the message is not a ModelInferRequest");
  }

 private:
  bool CheckRequest() {
    return EachField([this](int field, int size) {
      switch (field) {
        case kParameters:
          return Count(request_parameters_, limits_.max_parameters, "parameters") &&
                 CheckParameter();
        case kInputs:
          return Count(inputs_, limits_.max_inputs, "inputs") && CheckInput();
        case kOutputs:
          return Count(outputs_, limits_.max_outputs, "outputs") && CheckOutput();
        case kRawContents:
          return Count(raw_contents_, limits_.max_inputs, "raw_input_contents entries") &&
                 Except(size);
        default:
          return HasRoomFor(size);
      }
    });
  }

  bool CheckInput() {
    return EachField([this](int field, int size) {
      if (field == kInputParameters) return CheckTensorParameter();
      return field == kInputContents ? CheckContents() : HasRoomFor(size);
    });
  }

  bool CheckOutput() {
    return EachField([this](int field, int size) {
      return field == kOutputParameters ? CheckTensorParameter() : HasRoomFor(size);
    });
  }

  // Packed elements of the types that tensors have here; those of others are as good as text.
  bool CheckContents() {
    return EachField([this](int field, int size) {
      const auto num_bytes = static_cast<std::size_t>(size);
      switch (field) {
        case kIntContents:
        case kInt64Contents:
          return Add(num_bytes, int_bytes_, limits_.max_int_bytes,
                     "bytes of int_contents and int64_contents") &&
                 Except(size);
        case kFp32Contents:
          return Add(num_bytes, fp32_bytes_, limits_.max_fp32_bytes, "bytes of fp32_contents") &&
                 Except(size);
        case kBytesContents:
          return Count(strings_, limits_.max_inputs, "bytes_contents entries") && HasRoomFor(size);
        default:
          return HasRoomFor(size);
      }
    });
  }

  bool CheckTensorParameter() {
    return Count(tensor_parameters_, limits_.max_parameters, "tensor parameters") &&
           CheckParameter();
  }

  bool CheckParameter() {
    return EachField([this](int field, int size) {
      if (field != kEntryValue) return HasRoomFor(size);
      return EachField([this](int, int value_size) { return HasRoomFor(value_size); });
    });
  }

  // Calls on_field(number, size) for each length-delimited field up to the stream's limit, which is
  // the field's end meanwhile; on_field need not read it to there. False for bytes that are no
  // message, and where something was refused.
  template <typename OnField>
  bool EachField(const OnField& on_field) {
    while (const std::uint32_t tag = stream_->ReadTag()) {
      if (!Count(fields_, limits_.max_fields, "fields (pack elements)") || !HasRoomFor(0)) {
        return false;
      }
      const auto type = WireFormatLite::GetTagWireType(tag);
      if (type != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
        // This version of the language has no groups, and fields within one would go uncounted.
        if (type == WireFormatLite::WIRETYPE_START_GROUP) return false;
        if (!WireFormatLite::SkipField(stream_, tag)) return false;
        continue;
      }
      int size = 0;
      if (!stream_->ReadVarintSizeAsInt(&size)) return false;
      const int outer = stream_->BytesUntilLimit();
      if (outer >= 0 && size > outer) return false;
      const auto limit = stream_->PushLimit(size);
      if (!on_field(WireFormatLite::GetTagFieldNumber(tag), size)) return false;
      if (!stream_->Skip(stream_->BytesUntilLimit())) return false;
      stream_->PopLimit(limit);
    }
    return stream_->ConsumedEntireMessage();
  }

  // What follows, `size` bytes, has a bound of its own.
  bool Except(int size) {
    excepted_bytes_ += static_cast<std::size_t>(size);
    return true;
  }
  // Whether what was read until now, and `size` bytes more, is within the bound of all the rest.
  bool HasRoomFor(int size) {
    const std::size_t read = static_cast<std::size_t>(stream_->CurrentPosition());
    if (read + static_cast<std::size_t>(size) - excepted_bytes_ <= limits_.max_other_bytes) {
      return true;
    }
    return Refuse(limits_.max_other_bytes, "bytes beside raw entries and packed elements");
  }
  bool Count(std::size_t& count, std::size_t limit, const char* what) {
    return Add(1, count, limit, what);
  }
  bool Add(std::size_t more, std::size_t& sum, std::size_t limit, const char* what) {
    sum += more;
    return sum <= limit || Refuse(limit, what);
  }
  bool Refuse(std::size_t limit, const char* what) {
    refusal_ = absl::InvalidArgumentError(
        absl::StrCat("infer: request has more than the limit of ", limit, " ", what,
                     "; send what the model's tensors need, in raw_input_contents"));
    return false;
  }

  CodedInputStream* const stream_;
  const RequestLimits& limits_;
  std::size_t fields_ = 0;
  std::size_t inputs_ = 0;
  std::size_t outputs_ = 0;
  std::size_t raw_contents_ = 0;
  std::size_t request_parameters_ = 0;
  std::size_t tensor_parameters_ = 0;  // over all tensors, as the next three
  std::size_t strings_ = 0;            // elements of bytes_contents
  std::size_t int_bytes_ = 0;
  std::size_t fp32_bytes_ = 0;
  std::size_t excepted_bytes_ = 0;
  absl::Status refusal_;  // OK: nothing was refused
};

}  // namespace

RequestLimits RequestLimitsOf(const ServedModel& model) {
  const auto tokens = static_cast<std::size_t>(model.max_batch_tokens);
  const auto topk = static_cast<std::size_t>(model.topk);
  RequestLimits limits;
  limits.max_int_bytes = std::min(tokens * topk * kMaxVarintBytes, kMostTypedBytes);
  limits.max_fp32_bytes = std::min(
      tokens * (static_cast<std::size_t>(model.hidden) + topk) * sizeof(float), kMostTypedBytes);
  return limits;
}

absl::StatusOr<RequestCounts> CheckRequestBounds(const grpc::ByteBuffer& bytes,
                                                 const RequestLimits& limits) {
  grpc::ByteBuffer shared(bytes);  // Counts references; copies no bytes.
  grpc::ProtoBufferReader reader(&shared);
  CodedInputStream stream(&reader);
  return Bounds(&stream, limits).Check();
}

}  // namespace epserve::coordinator
