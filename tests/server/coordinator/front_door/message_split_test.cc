// Large raw entries and large packed elements cut out of a message: what is left is the message
// without them, however the bytes are cut into slices, and whatever is no message stays none.
#include "server/coordinator/front_door/message_split.h"

#include <gmock/gmock.h>
#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "inference/grpc_service.pb.h"
#include "proto/wire/wire_text.h"
#include "server/coordinator/front_door/request_bounds.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using Kind = LargeField::Kind;

constexpr std::size_t kLargeBytes = 10;

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

// What is found in the bytes, and what is left of them. Not OK: they are no message.
struct Parts {
  absl::Status status;
  std::vector<LargeField> large;
  SplitMessage split;
};

// The result points into `slices`.
Parts Split(const std::vector<grpc::Slice>& slices) {
  RequestLimits limits;
  limits.large_entry_bytes = kLargeBytes;
  auto outline = CheckRequestBounds(grpc::ByteBuffer(slices.data(), slices.size()), limits);
  if (!outline.ok()) return {outline.status(), {}, {}};
  SplitMessage split = SplitLargeFields(slices, outline->large);
  return {absl::OkStatus(), std::move(outline->large), std::move(split)};
}

std::string Field(int number, const std::string& bytes) {
  std::string text;
  wire::AppendBytesField(number, bytes, text);
  return text;
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

// Typed inputs with so many elements of FP32 each.
ModelInferRequest Typed(const std::vector<int>& counts) {
  ModelInferRequest message = Message({});
  message.clear_inputs();
  for (const int count : counts) {
    auto* input = message.add_inputs();
    input->set_name("input");
    input->add_shape(count);
    (*input->mutable_parameters())["parameter"].set_bool_param(true);
    input->mutable_contents();
    for (int i = 0; i < count; ++i) input->mutable_contents()->add_fp32_contents(0.5f + i);
  }
  return message;
}

std::string ElementsOf(const ModelInferRequest& message, int input) {
  const auto& elements = message.inputs(input).contents().fp32_contents();
  return std::string(reinterpret_cast<const char*>(elements.data()),
                     static_cast<std::size_t>(elements.size()) * sizeof(float));
}

class MessageSplitTest : public testing::Test {
 protected:
  MessageSplitTest() { google::protobuf::SetLogHandler(nullptr); }  // Bytes that are no message.

  std::mt19937 random_{7};
};

TEST_F(MessageSplitTest, LargeEntriesAreCutOutOfEverySlicingAndTheRestIsTheMessageWithoutThem) {
  const std::vector<std::string> raw = {std::string(40, 'a'), "small", std::string(300, 'b'), "",
                                        std::string(10, 'c')};
  const std::string bytes = Message(raw).SerializeAsString();
  for (int round = 0; round < 200; ++round) {
    const std::vector<grpc::Slice> slices = Cut(bytes, random_);
    const Parts parts = Split(slices);
    ASSERT_TRUE(parts.status.ok()) << parts.status;
    ASSERT_THAT(parts.large, SizeIs(3));
    ASSERT_THAT(parts.split.large, SizeIs(3));
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(parts.large[i].kind, Kind::kRawContents);
      EXPECT_EQ(parts.large[i].index, 2 * i);
      EXPECT_EQ(BytesOf(parts.split.large[i]), raw[2 * i]);
    }
    ModelInferRequest rest;
    ASSERT_TRUE(rest.ParseFromString(parts.split.rest));
    EXPECT_EQ(rest.SerializeAsString(), Message({"", "small", "", "", ""}).SerializeAsString());
  }
}

TEST_F(MessageSplitTest, LargeElementsAreCutOutOfTheirInputsAndAllLengthsAroundThemFollow) {
  // Two elements are small. A length has one byte, two, and three.
  ModelInferRequest message = Typed({3, 2, 40, 0, 9000});
  message.add_raw_input_contents(std::string(200, 'r'));
  const std::string bytes = message.SerializeAsString();
  for (int round = 0; round < 200; ++round) {
    const std::vector<grpc::Slice> slices = Cut(bytes, random_);
    const Parts parts = Split(slices);
    ASSERT_TRUE(parts.status.ok()) << parts.status;
    ASSERT_THAT(parts.large, SizeIs(4));
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(parts.large[i].kind, Kind::kFp32Contents);
      EXPECT_EQ(parts.large[i].index, 2 * i);
      EXPECT_EQ(BytesOf(parts.split.large[i]), ElementsOf(message, static_cast<int>(2 * i)));
    }
    EXPECT_EQ(parts.large[3].kind, Kind::kRawContents);
    EXPECT_EQ(parts.large[3].index, 0u);
    EXPECT_EQ(BytesOf(parts.split.large[3]), std::string(200, 'r'));
    ModelInferRequest rest;
    ASSERT_TRUE(rest.ParseFromString(parts.split.rest));
    ModelInferRequest expected = message;
    for (const int i : {0, 2, 4}) {
      expected.mutable_inputs(i)->mutable_contents()->clear_fp32_contents();
    }
    expected.set_raw_input_contents(0, "");
    EXPECT_EQ(rest.SerializeAsString(), expected.SerializeAsString());
  }
}

TEST_F(MessageSplitTest, ElementsOfOtherTypesStayBesideThoseThatAreCutOut) {
  ModelInferRequest message = Typed({40});
  message.mutable_inputs(0)->mutable_contents()->add_int_contents(-1);
  message.mutable_inputs(0)->mutable_contents()->add_fp64_contents(0.5);
  const std::vector<grpc::Slice> slices = {grpc::Slice(message.SerializeAsString())};
  const Parts parts = Split(slices);
  ASSERT_THAT(parts.large, SizeIs(1));
  ModelInferRequest rest;
  ASSERT_TRUE(rest.ParseFromString(parts.split.rest));
  message.mutable_inputs(0)->mutable_contents()->clear_fp32_contents();
  EXPECT_EQ(rest.SerializeAsString(), message.SerializeAsString());
}

TEST_F(MessageSplitTest, WhatTheParserHasToPutTogetherIsLeftToIt) {
  const std::string large = Field(6, std::string(20, 'x'));
  const std::string small = Field(6, std::string(4, 'y'));
  const std::string element =
      "\x35"
      "abcd";
  const struct {
    const char* what;
    std::string input;
  } cases[] = {
      {"two packed fields", Field(5, large + large)},
      {"a large one and a small one", Field(5, large + small)},
      {"a small one and a large one", Field(5, small + large)},
      {"an empty one beside it", Field(5, large + Field(6, ""))},
      {"contents twice", Field(5, large) + Field(1, "name") + Field(5, large)},
      {"an element by itself before it", Field(5, element + large)},
      {"an element by itself behind it", Field(5, large + element)},
      {"an element by itself in contents of its own", Field(5, element) + Field(5, large)},
      {"an element by itself alone", Field(5, element)},
      {"a small one alone", Field(5, small)},
  };
  for (const auto& item : cases) {
    // The next input's are cut out all the same.
    const std::string bytes = Field(5, item.input) + Field(5, Field(5, large));
    const std::vector<grpc::Slice> slices = {grpc::Slice(bytes)};
    const Parts parts = Split(slices);
    ASSERT_TRUE(parts.status.ok()) << item.what << parts.status;
    ASSERT_THAT(parts.large, SizeIs(1)) << item.what;
    EXPECT_EQ(parts.large[0].index, 1u) << item.what;
    EXPECT_EQ(parts.split.rest, Field(5, item.input) + Field(5, Field(5, Field(6, ""))))
        << item.what;
  }
}

TEST_F(MessageSplitTest, ContentsWithoutElementsAreNoSecondOnes) {
  const std::string elements(20, 'x');
  const std::string input =
      Field(5, "") + Field(5, Field(6, elements)) + Field(5, Field(8, "text"));
  const std::vector<grpc::Slice> slices = {grpc::Slice(Field(5, input))};
  const Parts parts = Split(slices);
  ASSERT_THAT(parts.large, SizeIs(1));
  EXPECT_EQ(BytesOf(parts.split.large[0]), elements);
  EXPECT_EQ(parts.split.rest,
            Field(5, Field(5, "") + Field(5, Field(6, "")) + Field(5, Field(8, "text"))));
}

// A number of `num_bytes` bytes, more of them than it needs.
std::string Long(std::size_t number, int num_bytes) {
  std::string text;
  for (int i = 0; i < num_bytes; ++i, number >>= 7) {
    const std::size_t more = i + 1 < num_bytes ? 0x80 : 0;
    text.push_back(static_cast<char>((number & 0x7f) | more));
  }
  return text;
}

TEST_F(MessageSplitTest, TheRestIsAMessageWhereTheWholeIsHoweverItsNumbersAreWritten) {
  const std::string raw(20, 'r');
  const std::string elements(20, 'e');
  for (int tag_bytes = 1; tag_bytes <= 10; ++tag_bytes) {
    for (int length_bytes = 1; length_bytes <= 10; ++length_bytes) {
      for (int level = 0; level < 4; ++level) {
        // The head of that level's field is written so.
        const auto field = [&](int at, int number, const std::string& bytes) {
          if (at != level) return Field(number, bytes);
          const auto tag = static_cast<std::size_t>(number << 3 | 2);
          return Long(tag, tag_bytes) + Long(bytes.size(), length_bytes) + bytes;
        };
        const std::string bytes =
            field(0, 5, Field(1, "n") + field(1, 5, field(2, 6, elements))) + field(3, 7, raw);
        ModelInferRequest whole;
        const bool is_message = whole.ParseFromString(bytes);
        EXPECT_EQ(is_message, tag_bytes <= 5 && length_bytes <= 5);
        const std::vector<grpc::Slice> slices = Cut(bytes, random_);
        const Parts parts = Split(slices);
        ASSERT_TRUE(parts.status.ok()) << parts.status;
        ASSERT_THAT(parts.split.large, SizeIs(2));
        EXPECT_EQ(BytesOf(parts.split.large[0]), elements);
        EXPECT_EQ(BytesOf(parts.split.large[1]), raw);
        ModelInferRequest rest;
        ASSERT_EQ(rest.ParseFromString(parts.split.rest), is_message)
            << tag_bytes << ' ' << length_bytes << ' ' << level;
        if (!is_message) continue;
        whole.mutable_inputs(0)->mutable_contents()->clear_fp32_contents();
        whole.set_raw_input_contents(0, "");
        EXPECT_EQ(rest.SerializeAsString(), whole.SerializeAsString());
      }
    }
  }
}

TEST_F(MessageSplitTest, ATagAbove32BitsIsTheOneThatTheParserTakesItFor) {
  const std::string bytes = "\xba\x80\x80\x80\x10\x14" + std::string(20, 'x');
  ModelInferRequest whole;
  ASSERT_TRUE(whole.ParseFromString(bytes));
  ASSERT_EQ(whole.raw_input_contents_size(), 1);
  const std::vector<grpc::Slice> slices = {grpc::Slice(bytes)};
  const Parts parts = Split(slices);
  ASSERT_THAT(parts.split.large, SizeIs(1));
  ModelInferRequest rest;
  ASSERT_TRUE(rest.ParseFromString(parts.split.rest));
  EXPECT_THAT(rest.raw_input_contents(), testing::ElementsAre(""));
}

TEST_F(MessageSplitTest, WhatIsNoMessageIsNotSplit) {
  const std::string entry = Field(7, std::string(20, 'x'));
  const std::string elements = Field(6, std::string(20, 'x'));
  const struct {
    const char* what;
    std::string bytes;
  } cases[] = {
      {"a length past the end", std::string("\x3a\x7f") + "short"},
      {"a length of 2^32", std::string("\x3a\x80\x80\x80\x80\x10") + "short"},
      {"a tag that ends the message", "\x80"},
      {"a wire type that there is not", "\x3f" + entry},
      {"elements past their contents' end", Field(5, std::string("\x2a\x08") + elements)},
      {"contents past their input's end", std::string("\x2a\x08") + Field(5, elements)},
      {"a part of an element", Field(5, Field(5, Field(6, std::string(21, 'x'))))},
  };
  for (const auto& item : cases) {
    ModelInferRequest whole;
    EXPECT_FALSE(whole.ParseFromString(item.bytes)) << item.what;
    const std::vector<grpc::Slice> slices = {grpc::Slice(item.bytes)};
    EXPECT_EQ(Split(slices).status.code(), absl::StatusCode::kInvalidArgument) << item.what;
  }
}

TEST_F(MessageSplitTest, UnknownFieldsOfEveryKindArePassedOver) {
  // Fields 9 (varint), 10 (64 bits), 11 (32 bits), 12 (bytes), then a large entry.
  const std::string before =
      std::string("\x48\x96\x01\x51") + "12345678" + "\x5d" + "1234" + "\x62\x03" + "abc";
  const std::vector<grpc::Slice> slices = {grpc::Slice(before + "\x3a\x14" + std::string(20, 'x'))};
  const Parts parts = Split(slices);
  ASSERT_THAT(parts.split.large, SizeIs(1));
  EXPECT_EQ(BytesOf(parts.split.large[0]), std::string(20, 'x'));
  EXPECT_EQ(parts.split.rest, before + std::string("\x3a\0", 2));
}

TEST_F(MessageSplitTest, WithoutLargeFieldsTheRestIsTheWhole) {
  const std::string bytes = Message({"small"}).SerializeAsString();
  const std::vector<grpc::Slice> slices = Cut(bytes, random_);
  const Parts parts = Split(slices);
  EXPECT_THAT(parts.split.large, IsEmpty());
  EXPECT_EQ(parts.split.rest, bytes);
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
