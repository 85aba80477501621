// Large raw entries cut out of a message: what is left is the message without them, however the
// bytes are cut into slices, and whatever is no message stays none.
#include "server/coordinator/front_door/message_split.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "inference/grpc_service.pb.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using ::testing::IsEmpty;
using ::testing::SizeIs;

std::string BytesOf(const RawView& raw) {
  std::string bytes(raw.size(), '?');
  raw.Copy(0, bytes);
  return bytes;
}

std::vector<grpc::Slice> Cut(const std::string& bytes, std::mt19937& random) {
  std::vector<grpc::Slice> slices;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t size = std::min<std::size_t>(random() % 9, bytes.size() - at);  // 0 too
    slices.emplace_back(bytes.substr(at, size));
    at += size;
  }
  return slices;
}

ModelInferRequest Message(const std::vector<std::string>& raw) {
  ModelInferRequest message;
  message.set_model_name("model");
  message.set_id("an id");
  (*message.mutable_parameters())["layer"].set_int64_param(3);
  auto* input = message.add_inputs();
  input->set_name("hidden_states");
  input->add_shape(-1);
  for (const std::string& entry : raw) message.add_raw_input_contents(entry);
  return message;
}

TEST(MessageSplitTest, LargeEntriesAreCutOutOfEverySlicingAndTheRestIsTheMessageWithoutThem) {
  std::mt19937 random(7);
  const std::vector<std::string> raw = {std::string(40, 'a'), "small", std::string(300, 'b'), "",
                                        std::string(10, 'c')};
  const std::string bytes = Message(raw).SerializeAsString();
  for (int round = 0; round < 200; ++round) {
    const std::vector<grpc::Slice> slices = Cut(bytes, random);
    const SplitMessage split = SplitLargeEntries(slices, 10);
    ASSERT_THAT(split.large, SizeIs(3));
    EXPECT_EQ(split.large[0].first, 0u);
    EXPECT_EQ(split.large[1].first, 2u);
    EXPECT_EQ(split.large[2].first, 4u);
    for (const auto& [index, view] : split.large) EXPECT_EQ(BytesOf(view), raw[index]);
    ModelInferRequest rest;
    ASSERT_TRUE(rest.ParseFromString(split.rest));
    EXPECT_EQ(rest.SerializeAsString(), Message({"", "small", "", "", ""}).SerializeAsString());
  }
}

TEST(MessageSplitTest, WhatIsNotPlainIsLeftToTheParserWithAllThatFollows) {
  const std::string entry = "\x3a\x14" + std::string(20, 'x');
  const struct {
    const char* what;
    std::string bytes;
  } cases[] = {
      {"a group", "\x0b" + entry + "\x0c"},
      {"a tag above 32 bits, which the parser takes for field 7", "\xba\x80\x80\x80\x10\x01z"},
      {"a length past the end", std::string("\x3a\x7f") + "short"},
      {"a length of 2^32", std::string("\x3a\x80\x80\x80\x80\x10") + "short"},
      {"a tag that ends the message", "\x80"},
      {"a wire type that there is not", "\x3f" + entry},
  };
  for (const auto& item : cases) {
    const grpc::Slice slice(item.bytes + entry);
    const SplitMessage split = SplitLargeEntries({&slice, 1}, 10);
    EXPECT_THAT(split.large, IsEmpty()) << item.what;
    EXPECT_EQ(split.rest, item.bytes + entry) << item.what;
  }
}

TEST(MessageSplitTest, UnknownFieldsOfEveryKindArePassedOver) {
  // Fields 9 (varint), 10 (64 bits), 11 (32 bits), 12 (bytes), then a large entry.
  const std::string before =
      std::string("\x48\x96\x01\x51") + "12345678" + "\x5d" + "1234" + "\x62\x03" + "abc";
  const grpc::Slice slice(before + "\x3a\x14" + std::string(20, 'x'));
  const SplitMessage split = SplitLargeEntries({&slice, 1}, 10);
  ASSERT_THAT(split.large, SizeIs(1));
  EXPECT_EQ(BytesOf(split.large[0].second), std::string(20, 'x'));
  EXPECT_EQ(split.rest, before + std::string("\x3a\0", 2));
}

TEST(RawViewTest, CopiesAnyRangeOverPieces) {
  const std::string bytes = "abcdefghij";
  RawView raw;
  raw.Append({bytes.data(), 3});
  raw.Append({bytes.data() + 3, 1});
  raw.Append({bytes.data() + 4, 6});
  for (std::size_t from = 0; from <= bytes.size(); ++from) {
    for (std::size_t size = 0; from + size <= bytes.size(); ++size) {
      std::string out(size, '?');
      raw.Copy(from, out);
      EXPECT_EQ(out, bytes.substr(from, size));
    }
  }
}

}  // namespace
}  // namespace epserve::coordinator
