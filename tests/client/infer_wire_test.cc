// What is put on the wire is what the generated code would put there, and what comes from it is
// what that would read.
#include "client/cpp/infer_wire.h"

#include <gtest/gtest.h>

#include <string>
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

inference::ModelInferResponse Response() {
  inference::ModelInferResponse response;
  response.set_model_name("model");
  response.set_id("7");
  response.add_outputs()->set_name("hidden_states");
  response.add_raw_output_contents(std::string(100'000, 'r'));
  response.add_raw_output_contents("");
  return response;
}

TEST(InferWireTest, RequestsAreTheBytesOfTheGeneratedCode) {
  for (const std::size_t size : {0, 3, 16 << 10, (16 << 10) + 1, 1 << 20}) {
    inference::ModelInferRequest message;
    message.set_model_name("model");
    message.add_inputs()->set_name("hidden_states");
    message.add_raw_input_contents(std::string(size, 'h'));
    message.add_raw_input_contents("ids");
    message.add_raw_input_contents(std::string(size, 'w'));
    const std::string expected = message.SerializeAsString();
    EXPECT_EQ(BytesOf(Serialize(std::move(message))), expected) << size;
  }
}

TEST(InferWireTest, ResponsesAreReadWhole) {
  const inference::ModelInferResponse expected = Response();
  inference::ModelInferResponse response;
  ASSERT_TRUE(Parse(BufferOf(expected.SerializeAsString()), &response).ok());
  EXPECT_EQ(response.SerializeAsString(), expected.SerializeAsString());

  inference::ModelStreamInferResponse wrapped;
  *wrapped.mutable_infer_response() = expected;
  wrapped.set_error_message("why");
  inference::ModelStreamInferResponse streamed;
  ASSERT_TRUE(Parse(BufferOf(wrapped.SerializeAsString()), &streamed).ok());
  EXPECT_EQ(streamed.SerializeAsString(), wrapped.SerializeAsString());
}

TEST(InferWireTest, BytesThatAreNoResponseAreInternalErrors) {
  const std::string whole = Response().SerializeAsString();
  for (const std::string& bytes :
       {std::string("\xff\xff\xff"), whole.substr(0, whole.size() - 5),
        std::string("\x32\xff\xff\xff\x7f") + "short", std::string("\x32\x05") + "abc"}) {
    inference::ModelInferResponse response;
    EXPECT_EQ(Parse(BufferOf(bytes), &response).code(), absl::StatusCode::kInternal);
    inference::ModelStreamInferResponse streamed;
    const std::string head = std::string("\x12") + static_cast<char>(0x7f);
    EXPECT_EQ(Parse(BufferOf(head + bytes.substr(0, 100)), &streamed).code(),
              absl::StatusCode::kInternal);
  }
  inference::ModelInferResponse response;
  EXPECT_EQ(Parse(grpc::ByteBuffer(), &response).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace epserve::client
