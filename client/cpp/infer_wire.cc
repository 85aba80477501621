#include "client/cpp/infer_wire.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/slice.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace epserve::client {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;
using google::protobuf::io::StringOutputStream;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using inference::ModelStreamInferResponse;

constexpr std::uint32_t Delimited(int field) {
  return static_cast<std::uint32_t>(field) << 3 | WireFormatLite::WIRETYPE_LENGTH_DELIMITED;
}

// Entries up to this size are sent in one piece with what stands before them.
constexpr std::size_t kCopiedBytes = 16 << 10;

grpc::Slice SliceOf(std::string&& text) {
  auto* const owned = new std::string(std::move(text));
  return grpc::Slice(
      owned->data(), owned->size(), [](void* held) { delete static_cast<std::string*>(held); },
      owned);
}

void AppendHead(int field, std::size_t bytes, std::string& text) {
  StringOutputStream stream(&text);
  CodedOutputStream coded(&stream);
  coded.WriteTag(Delimited(field));
  coded.WriteVarint64(bytes);
}

// A response whose raw entries stand apart.
struct ResponseParts {
  std::string rest;
  std::vector<std::string> raw;
};

bool Split(CodedInputStream* input, ResponseParts* parts) {
  StringOutputStream stream(&parts->rest);
  CodedOutputStream rest(&stream);
  while (const std::uint32_t tag = input->ReadTag()) {
    if (tag != Delimited(ModelInferResponse::kRawOutputContentsFieldNumber)) {
      if (!WireFormatLite::SkipField(input, tag, &rest)) return false;
      continue;
    }
    int length = 0;
    if (!input->ReadVarintSizeAsInt(&length)) return false;
    // So that a wrong length allocates nothing. Only within a limit is it known what is left.
    const int left = input->BytesUntilLimit();
    if (left < 0 || length > left) return false;
    std::string& raw = parts->raw.emplace_back(static_cast<std::size_t>(length), '\0');
    if (!input->ReadRaw(raw.data(), length)) return false;
  }
  return input->ConsumedEntireMessage();
}

bool Join(ResponseParts parts, ModelInferResponse* message) {
  if (!message->ParseFromString(parts.rest)) return false;
  for (std::string& raw : parts.raw) *message->add_raw_output_contents() = std::move(raw);
  return true;
}

bool SplitStream(CodedInputStream* input, ResponseParts* parts, std::string* rest_text) {
  StringOutputStream stream(rest_text);
  CodedOutputStream rest(&stream);
  bool found = false;
  while (const std::uint32_t tag = input->ReadTag()) {
    if (found || tag != Delimited(ModelStreamInferResponse::kInferResponseFieldNumber)) {
      if (!WireFormatLite::SkipField(input, tag, &rest)) return false;
      continue;
    }
    found = true;
    int length = 0;
    if (!input->ReadVarintSizeAsInt(&length) || length > input->BytesUntilLimit()) return false;
    const auto limit = input->PushLimit(length);
    if (!Split(input, parts)) return false;
    input->PopLimit(limit);
  }
  return input->ConsumedEntireMessage();
}

// Calls use(stream over the bytes) and gives what that gives; false where there are none.
template <typename Use>
bool Over(grpc::ByteBuffer& bytes, const Use& use) {
  if (!bytes.Valid()) return false;
  const auto length = static_cast<int>(bytes.Length());
  grpc::ProtoBufferReader reader(&bytes);
  if (!reader.status().ok()) return false;
  CodedInputStream input(&reader);
  input.PushLimit(length);
  return use(&input);
}

absl::Status Malformed(const char* what) {
  return absl::InternalError(absl::StrCat("infer: the answer is not a ", what));
}

}  // namespace

grpc::ByteBuffer Serialize(ModelInferRequest message) {
  google::protobuf::RepeatedPtrField<std::string> raw;
  raw.Swap(message.mutable_raw_input_contents());
  std::string text = message.SerializeAsString();
  std::vector<grpc::Slice> slices;
  for (std::string& entry : raw) {
    AppendHead(ModelInferRequest::kRawInputContentsFieldNumber, entry.size(), text);
    if (entry.size() <= kCopiedBytes) {
      text += entry;
    } else {
      slices.push_back(SliceOf(std::exchange(text, {})));
      slices.push_back(SliceOf(std::move(entry)));
    }
  }
  if (!text.empty()) slices.push_back(SliceOf(std::move(text)));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

absl::Status Parse(grpc::ByteBuffer bytes, ModelInferResponse* message) {
  ResponseParts parts;
  message->Clear();
  const bool split = Over(bytes, [&](CodedInputStream* input) { return Split(input, &parts); });
  if (split && Join(std::move(parts), message)) return absl::OkStatus();
  return Malformed("ModelInferResponse");
}

absl::Status Parse(grpc::ByteBuffer bytes, ModelStreamInferResponse* message) {
  ResponseParts parts;
  std::string rest;
  message->Clear();
  const bool split =
      Over(bytes, [&](CodedInputStream* input) { return SplitStream(input, &parts, &rest); });
  if (split && message->ParseFromString(rest) &&
      Join(std::move(parts), message->mutable_infer_response())) {
    return absl::OkStatus();
  }
  return Malformed("ModelStreamInferResponse");
}

}  // namespace epserve::client
