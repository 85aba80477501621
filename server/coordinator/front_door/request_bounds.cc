#include "server/coordinator/front_door/request_bounds.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/coordinator/front_door/request_fields.h"

namespace epserve::coordinator {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

// A negative number, such as the id of no expert.
constexpr std::size_t kMaxVarintBytes = 10;

// Elements are parsed on the thread that takes the workers' heartbeats, and five callers with
// 112 MiB of them each kept it for longer than a lease: these are for small requests.
constexpr std::size_t kMostParsedBytes = std::size_t{4} << 20;

// One look at one message.
class Bounds {
 public:
  Bounds(CodedInputStream* stream, const RequestLimits& limits)
      : stream_(stream), limits_(limits) {}

  absl::StatusOr<RequestOutline> Check() {
    if (CheckRequest()) return std::move(outline_);
    if (!refusal_.ok()) return refusal_;
    return absl::InvalidArgumentError("infer: the message is not a ModelInferRequest");
  }

 private:
  bool CheckRequest() {
    return EachField([this](int field, int size) {
      switch (field) {
        case RequestField::kParameters:
          return Count(request_parameters_, limits_.max_parameters, "parameters") &&
                 CheckParameter();
        case RequestField::kInputs:
          return Count(inputs_, limits_.max_inputs, "inputs") && CheckInput();
        case RequestField::kOutputs:
          return Count(outputs_, limits_.max_outputs, "outputs") && CheckOutput();
        case RequestField::kRawContents:
          return Count(outline_.raw_contents, limits_.max_inputs, "raw_input_contents entries") &&
                 SeeRawContents(size);
        default:
          return HasRoomFor(size);
      }
    });
  }

  bool CheckInput() {
    fp32_fields_ = 0;
    fp32_field_.reset();
    const std::size_t fp32_bytes_before = fp32_bytes_;
    const bool in_bounds = EachField([this](int field, int size) {
      if (field == InputField::kParameters) return CheckTensorParameter();
      return field == InputField::kContents ? CheckContents() : HasRoomFor(size);
    });
    if (!in_bounds) return false;
    if (fp32_fields_ == 1 && fp32_field_.has_value()) {
      outline_.large.push_back(*std::move(fp32_field_));
      return true;
    }
    return Add(fp32_bytes_ - fp32_bytes_before, parsed_fp32_bytes_, limits_.max_parsed_fp32_bytes,
               "bytes of fp32_contents that are not one packed field of an input");
  }

  bool CheckOutput() {
    return EachField([this](int field, int size) {
      return field == OutputField::kParameters ? CheckTensorParameter() : HasRoomFor(size);
    });
  }

  // Packed elements of the types that tensors have here; those of others are as good as text.
  bool CheckContents() {
    const auto on_field = [this](int field, int size) {
      const auto num_bytes = static_cast<std::size_t>(size);
      switch (field) {
        case ContentsField::kInt32:
        case ContentsField::kInt64:
          return Add(num_bytes, int_bytes_, limits_.max_int_bytes,
                     "bytes of int_contents and int64_contents") &&
                 Except(size);
        case ContentsField::kFp32:
          return Add(num_bytes, fp32_bytes_, limits_.max_fp32_bytes, "bytes of fp32_contents") &&
                 SeeFp32Contents(size);
        case ContentsField::kBytes:
          return Count(strings_, limits_.max_inputs, "bytes_contents entries") && HasRoomFor(size);
        default:
          return HasRoomFor(size);
      }
    };
    return EachField(on_field,
                     [this](int field) { fp32_fields_ += field == ContentsField::kFp32; });
  }

  bool SeeRawContents(int size) {
    if (static_cast<std::size_t>(size) >= limits_.large_entry_bytes) {
      outline_.large.push_back(
          FieldHere(LargeField::Kind::kRawContents, outline_.raw_contents - 1));
    }
    return Except(size);
  }

  // The parser, too, takes no parts of elements.
  bool SeeFp32Contents(int size) {
    const auto num_bytes = static_cast<std::size_t>(size);
    ++fp32_fields_;
    if (num_bytes > 0 && num_bytes >= limits_.large_entry_bytes) {
      fp32_field_ = FieldHere(LargeField::Kind::kFp32Contents, inputs_ - 1);
    }
    return num_bytes % sizeof(float) == 0 && Except(size);
  }

  // The field whose length was the last to be read.
  LargeField FieldHere(LargeField::Kind kind, std::size_t index) const {
    LargeField field{kind, index, static_cast<std::size_t>(stream_->CurrentPosition()), {}};
    field.lengths.assign(lengths_.begin(), lengths_.end());
    return field;
  }

  bool CheckTensorParameter() {
    return Count(tensor_parameters_, limits_.max_parameters, "tensor parameters") &&
           CheckParameter();
  }

  bool CheckParameter() {
    return EachField([this](int field, int size) {
      if (field != EntryField::kValue) return HasRoomFor(size);
      return EachField([this](int, int value_size) { return HasRoomFor(value_size); });
    });
  }

  // Calls on_field(number, size) for each length-delimited field up to the stream's limit, which is
  // the field's end meanwhile; on_field need not read it to there. Calls on_number(number) for each
  // other field. False for bytes that are no message, and where something was refused.
  template <typename OnField, typename OnNumber>
  bool EachField(const OnField& on_field, const OnNumber& on_number) {
    while (const std::uint32_t tag = stream_->ReadTag()) {
      if (!Count(fields_, limits_.max_fields, "fields (pack elements)") || !HasRoomFor(0)) {
        return false;
      }
      const int field = WireFormatLite::GetTagFieldNumber(tag);
      const auto type = WireFormatLite::GetTagWireType(tag);
      if (type != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
        // This version of the language has no groups, and fields within one would go uncounted.
        if (type == WireFormatLite::WIRETYPE_START_GROUP) return false;
        if (!WireFormatLite::SkipField(stream_, tag)) return false;
        on_number(field);
        continue;
      }
      const int at = stream_->CurrentPosition();
      int size = 0;
      if (!stream_->ReadVarintSizeAsInt(&size)) return false;
      const int outer = stream_->BytesUntilLimit();
      if (outer >= 0 && size > outer) return false;
      lengths_.push_back({static_cast<std::size_t>(at),
                          static_cast<std::size_t>(stream_->CurrentPosition() - at),
                          static_cast<std::size_t>(size)});
      const auto limit = stream_->PushLimit(size);
      if (!on_field(field, size)) return false;
      if (!stream_->Skip(stream_->BytesUntilLimit())) return false;
      stream_->PopLimit(limit);
      lengths_.pop_back();
    }
    return stream_->ConsumedEntireMessage();
  }
  template <typename OnField>
  bool EachField(const OnField& on_field) {
    return EachField(on_field, [](int) {});
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
  std::size_t request_parameters_ = 0;
  std::size_t tensor_parameters_ = 0;  // over all tensors, as the next three
  std::size_t strings_ = 0;            // elements of bytes_contents
  std::size_t int_bytes_ = 0;
  std::size_t fp32_bytes_ = 0;
  std::size_t parsed_fp32_bytes_ = 0;
  std::size_t excepted_bytes_ = 0;
  // Of the present input: fields of fp32_contents, packed or not, and the last that is large.
  std::size_t fp32_fields_ = 0;
  std::optional<LargeField> fp32_field_;
  absl::InlinedVector<FieldLength, 4> lengths_;  // of the fields that the stream is in
  RequestOutline outline_;
  absl::Status refusal_;  // OK: nothing was refused
};

}  // namespace

RequestLimits RequestLimitsOf(const ServedModel& model) {
  const auto tokens = static_cast<std::size_t>(model.max_batch_tokens);
  const auto topk = static_cast<std::size_t>(model.topk);
  RequestLimits limits;
  limits.max_int_bytes = std::min(tokens * topk * kMaxVarintBytes, kMostParsedBytes);
  limits.max_fp32_bytes = tokens * (static_cast<std::size_t>(model.hidden) + topk) * sizeof(float);
  limits.max_parsed_fp32_bytes = std::min(limits.max_fp32_bytes, kMostParsedBytes);
  return limits;
}

absl::StatusOr<RequestOutline> CheckRequestBounds(const grpc::ByteBuffer& bytes,
                                                  const RequestLimits& limits) {
  grpc::ByteBuffer shared(bytes);  // Counts references; copies no bytes.
  grpc::ProtoBufferReader reader(&shared);
  CodedInputStream stream(&reader);
  return Bounds(&stream, limits).Check();
}

}  // namespace epserve::coordinator
