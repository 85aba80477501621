#include "client/cpp/infer_wire.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/slice.h>

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/wire/wire_text.h"

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
// Entries of a response from this size on stay in the pieces that they came in.
constexpr int kPiecesBytes = 1 << 20;
// Of an entry: tag and length.
constexpr std::size_t kMostHeadBytes = 11;

grpc::Slice SliceOf(std::string&& text) {
  auto* const owned = new std::string(std::move(text));
  return grpc::Slice(
      owned->data(), owned->size(), [](void* held) { delete static_cast<std::string*>(held); },
      owned);
}

grpc::Slice SliceOf(const TensorBytes& bytes) {
  auto* const held = new TensorBytes(bytes);
  return grpc::Slice(
      const_cast<char*>(held->data()), held->size(),  // gRPC only reads.
      [](void* dropped) { delete static_cast<TensorBytes*>(dropped); }, held);
}

// A response as it is taken apart.
struct Pieces {
  std::shared_ptr<const void> owner;  // of the bytes
  TensorBytes spare;
  std::string rest;  // the message without its raw entries
  std::vector<TensorBytes> raw;
};

// What comes next, where it stands in the buffer.
bool ReadPieces(CodedInputStream* input, int length, std::vector<std::string_view>* found) {
  while (length > 0) {
    const void* data = nullptr;
    int here = 0;
    if (!input->GetDirectBufferPointer(&data, &here)) return false;
    here = std::min(here, length);
    found->emplace_back(static_cast<const char*>(data), here);
    if (!input->Skip(here)) return false;
    length -= here;
  }
  return true;
}

bool Split(CodedInputStream* input, Pieces* pieces) {
  StringOutputStream stream(&pieces->rest);
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
    TensorBytes spare = std::exchange(pieces->spare, TensorBytes());
    if (length >= kPiecesBytes) {
      std::vector<std::string_view> found;
      if (!ReadPieces(input, length, &found)) return false;
      pieces->raw.emplace_back(std::move(found), pieces->owner, std::move(spare));
      continue;
    }
    TensorMemory memory(static_cast<std::size_t>(length), std::move(spare));
    if (!input->ReadRaw(memory.data(), length)) return false;
    pieces->raw.push_back(std::move(memory));
  }
  return input->ConsumedEntireMessage();
}

bool SplitStream(CodedInputStream* input, Pieces* pieces, std::string* rest_text) {
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
    if (!Split(input, pieces)) return false;
    input->PopLimit(limit);
  }
  return input->ConsumedEntireMessage();
}

// What the generated code has read of a small message, with its raw entries moved out.
void TakeRaw(ModelInferResponse* message, std::vector<TensorBytes>* raw) {
  for (std::string& entry : *message->mutable_raw_output_contents()) {
    raw->push_back(std::move(entry));
  }
  message->clear_raw_output_contents();
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

// The buffer, for whoever keeps what is in it.
std::shared_ptr<grpc::ByteBuffer> Take(grpc::ByteBuffer& bytes) {
  auto held = std::make_shared<grpc::ByteBuffer>();
  held->Swap(&bytes);
  return held;
}

absl::Status Malformed(const char* what) {
  return absl::InternalError(absl::StrCat("infer: the answer is not a ", what));
}

template <typename Message>
bool ParseWhole(grpc::ByteBuffer& bytes, Message* message) {
  return Over(bytes, [&](CodedInputStream* input) {
    return message->ParseFromCodedStream(input) && input->ConsumedEntireMessage();
  });
}

}  // namespace

grpc::ByteBuffer Serialize(const RequestParts& request) {
  std::size_t bytes = request.head.size();
  for (const TensorBytes& entry : request.raw) {
    bytes += kMostHeadBytes + (entry.size() <= kCopiedBytes ? entry.size() : 0);
  }
  std::string text;
  text.reserve(bytes);
  text = request.head;
  std::vector<grpc::Slice> slices;
  for (const TensorBytes& entry : request.raw) {
    wire::AppendFieldHead(ModelInferRequest::kRawInputContentsFieldNumber, entry.size(), text);
    if (entry.size() <= kCopiedBytes) {
      text += std::string_view(entry);
    } else {
      slices.push_back(SliceOf(std::exchange(text, {})));
      slices.push_back(SliceOf(entry));
    }
  }
  if (!text.empty()) slices.push_back(SliceOf(std::move(text)));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

absl::Status Parse(grpc::ByteBuffer&& bytes, TensorBytes spare, ResponseParts* parts) {
  *parts = {};
  bool whole = false;
  if (bytes.Valid() && bytes.Length() <= kCopiedBytes) {
    whole = ParseWhole(bytes, &parts->message);
    TakeRaw(&parts->message, &parts->raw);
  } else {
    const std::shared_ptr<grpc::ByteBuffer> held = Take(bytes);
    Pieces pieces{.owner = held, .spare = std::move(spare)};
    whole = Over(*held, [&](CodedInputStream* input) { return Split(input, &pieces); }) &&
            parts->message.ParseFromString(pieces.rest);
    parts->raw = std::move(pieces.raw);
  }
  bytes.Clear();
  return whole ? absl::OkStatus() : Malformed("ModelInferResponse");
}

absl::Status Parse(grpc::ByteBuffer&& bytes, TensorBytes spare, StreamedParts* parts) {
  *parts = {};
  bool whole = false;
  if (bytes.Valid() && bytes.Length() <= kCopiedBytes) {
    whole = ParseWhole(bytes, &parts->message);
    if (parts->message.has_infer_response()) {
      TakeRaw(parts->message.mutable_infer_response(), &parts->raw);
    }
  } else {
    const std::shared_ptr<grpc::ByteBuffer> held = Take(bytes);
    Pieces pieces{.owner = held, .spare = std::move(spare)};
    std::string rest;
    const bool split =
        Over(*held, [&](CodedInputStream* input) { return SplitStream(input, &pieces, &rest); });
    whole = split && parts->message.ParseFromString(rest) &&
            parts->message.mutable_infer_response()->ParseFromString(pieces.rest);
    parts->raw = std::move(pieces.raw);
  }
  bytes.Clear();
  return whole ? absl::OkStatus() : Malformed("ModelStreamInferResponse");
}

}  // namespace epserve::client
