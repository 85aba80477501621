// What is put on the wire is what the generated code would put there, and what comes from it is
// what that would read.
#include "client/cpp/infer_wire.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace epserve::client {
namespace {

std::string BytesOf(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

grpc::ByteBuffer BufferOf(const std::string& bytes) {
  const std::size_t cut = bytes.size() / 3;
  const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)), grpc::Slice(bytes.substr(cut))};
  return grpc::ByteBuffer(slices, 2);
}

inference::ModelInferResponse Response(std::size_t raw_bytes) {
  inference::ModelInferResponse response;
  response.set_model_name("model");
  response.set_id("7");
  response.add_outputs()->set_name("hidden_states");
  response.add_raw_output_contents(std::string(raw_bytes, 'r'));
  response.add_raw_output_contents("");
  return response;
}

// The message that the parts are of.
template <typename Message>
std::string Joined(Message message, const std::vector<TensorBytes>& raw) {
  EXPECT_EQ(message.raw_output_contents_size(), 0);
  for (const TensorBytes& entry : raw) message.add_raw_output_contents(std::string(entry));
  return message.SerializeAsString();
}

TEST(InferWireTest, RequestsAreTheBytesOfTheGeneratedCode) {
  for (const std::size_t size : {0, 3, 16 << 10, (16 << 10) + 1, 1 << 20}) {
    RequestParts parts;
    inference::ModelInferRequest whole;
    whole.set_model_name("model");
    whole.add_inputs()->set_name("hidden_states");
    parts.head = whole.SerializeAsString();
    parts.raw = {std::string(size, 'h'), std::string("ids"), std::string(size, 'w')};
    for (const TensorBytes& entry : parts.raw) whole.add_raw_input_contents(std::string(entry));
    EXPECT_EQ(BytesOf(Serialize(parts)), whole.SerializeAsString()) << size;
  }
}

TEST(InferWireTest, LargeEntriesOfARequestAreSharedAndOutliveIt) {
  const std::string expected(100'000, 'h');
  TensorBytes bytes = expected;
  const char* const at = bytes.data();
  RequestParts parts;
  parts.raw = {std::move(bytes)};
  const grpc::ByteBuffer buffer = Serialize(std::exchange(parts, {}));
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(buffer.Dump(&slices).ok());
  ASSERT_EQ(slices.size(), 2u);
  EXPECT_EQ(reinterpret_cast<const char*>(slices[1].begin()), at);
  EXPECT_EQ(std::string(at, slices[1].size()), expected);
}

TEST(InferWireTest, ResponsesAreReadWhole) {
  for (const std::size_t raw_bytes : {0, 100, 100'000, 3 << 20}) {
    const inference::ModelInferResponse expected = Response(raw_bytes);
    ResponseParts parts;
    ASSERT_TRUE(Parse(BufferOf(expected.SerializeAsString()), {}, &parts).ok());
    EXPECT_EQ(Joined(parts.message, parts.raw), expected.SerializeAsString());

    inference::ModelStreamInferResponse wrapped;
    *wrapped.mutable_infer_response() = expected;
    wrapped.set_error_message("why");
    StreamedParts streamed;
    ASSERT_TRUE(Parse(BufferOf(wrapped.SerializeAsString()), {}, &streamed).ok());
    EXPECT_EQ(streamed.message.error_message(), "why");
    EXPECT_EQ(Joined(streamed.message.infer_response(), streamed.raw),
              expected.SerializeAsString());
  }
}

TEST(InferWireTest, LargeEntryOfAResponseIsWrittenToTheSpareMemoryOfItsOnlyHolder) {
  const std::string message = Response(100'000).SerializeAsString();
  TensorBytes spare = std::string(200'000, 's');
  const char* const at = spare.data();
  ResponseParts parts;
  ASSERT_TRUE(Parse(BufferOf(message), std::move(spare), &parts).ok());
  EXPECT_EQ(parts.raw.front().data(), at);
  EXPECT_EQ(std::string_view(parts.raw.front()), std::string(100'000, 'r'));

  const TensorBytes held = parts.raw.front();
  ASSERT_TRUE(Parse(BufferOf(message), std::move(parts.raw.front()), &parts).ok());
  EXPECT_NE(parts.raw.front().data(), at);
  EXPECT_EQ(std::string_view(held), std::string(100'000, 'r'));
}

std::vector<std::string_view> PiecesIn(const TensorBytes& bytes) {
  std::vector<std::string_view> pieces;
  bytes.ForEachPiece([&](std::string_view piece) { pieces.push_back(piece); });
  return pieces;
}

TEST(InferWireTest, EntriesOfAMegabyteStayInTheBufferUntilTheyAreWantedInOnePiece) {
  for (const bool large : {false, true}) {
    const std::size_t raw_bytes = (std::size_t{1} << 20) - (large ? 0 : 1);
    grpc::ByteBuffer buffer = BufferOf(Response(raw_bytes).SerializeAsString());
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(buffer.Dump(&slices).ok());
    TensorBytes spare = std::string(raw_bytes, 's');
    const char* const at = spare.data();
    ResponseParts parts;
    ASSERT_TRUE(Parse(std::move(buffer), std::move(spare), &parts).ok());
    const TensorBytes bytes = std::move(parts.raw.front());
    parts = {};
    const std::vector<std::string_view> pieces = PiecesIn(bytes);
    ASSERT_EQ(pieces.size(), large ? 2u : 1u);
    if (large) {
      EXPECT_EQ(pieces[0].end(), reinterpret_cast<const char*>(slices[0].end()));
      EXPECT_EQ(pieces[1].begin(), reinterpret_cast<const char*>(slices[1].begin()));
    }
    slices.clear();  // The bytes have a share of their own.
    EXPECT_EQ(bytes.data(), at);
    EXPECT_EQ(std::string_view(bytes), std::string(raw_bytes, 'r'));
  }
}

TEST(InferWireTest, LargeEntryThatEndsEarlyIsAnInternalError) {
  const std::string whole = Response(3 << 20).SerializeAsString();
  ResponseParts parts;
  EXPECT_EQ(Parse(BufferOf(whole.substr(0, 2 << 20)), {}, &parts).code(),
            absl::StatusCode::kInternal);
}

TEST(InferWireTest, BytesThatAreNoResponseAreInternalErrors) {
  const std::string whole = Response(100'000).SerializeAsString();
  const std::string small = Response(50).SerializeAsString();
  for (const std::string& bytes :
       {std::string("\xff\xff\xff"), whole.substr(0, whole.size() - 5),
        small.substr(0, small.size() - 5), std::string("\x32\xff\xff\xff\x7f") + "short",
        std::string("\x32\xff\xff\xff\x7f") + whole, std::string("\x32\x05") + "abc"}) {
    ResponseParts parts;
    EXPECT_EQ(Parse(BufferOf(bytes), {}, &parts).code(), absl::StatusCode::kInternal);
    StreamedParts streamed;
    const std::string head = std::string("\x12") + static_cast<char>(0x7f);
    EXPECT_EQ(Parse(BufferOf(head + bytes.substr(0, 100)), {}, &streamed).code(),
              absl::StatusCode::kInternal);
  }
  ResponseParts parts;
  EXPECT_EQ(Parse(grpc::ByteBuffer(), {}, &parts).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace epserve::client
