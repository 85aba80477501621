// What a request may hold: each bound passes at its limit and refuses past it, by name, however the
// bytes are cut into slices; what is refused is not looked at to its end.
#include "server/coordinator/front_door/request_bounds.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "inference/grpc_service.pb.h"
#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using testing::HasSubstr;

absl::StatusOr<RequestOutline> Look(const std::string& bytes, const RequestLimits& limits,
                                    std::size_t slice_bytes = 1000) {
  std::vector<grpc::Slice> slices;
  for (std::size_t at = 0; at < bytes.size(); at += slice_bytes) {
    slices.emplace_back(bytes.substr(at, slice_bytes));
  }
  return CheckRequestBounds(grpc::ByteBuffer(slices.data(), slices.size()), limits);
}

RequestLimits Limits() {
  RequestLimits limits = RequestLimitsOf(TestModel());
  limits.max_other_bytes = 2000;
  limits.max_fields = 300;
  limits.max_parsed_fp32_bytes = 200;
  limits.large_entry_bytes = 100;
  return limits;
}

std::string Times(int count, const std::string& field) {
  std::string text;
  for (int i = 0; i < count; ++i) text += field;
  return text;
}

std::string Field(int number, const std::string& bytes) {
  std::string text(1, static_cast<char>(number << 3 | 2));
  std::uint64_t left = bytes.size();
  for (; left >= 0x80; left >>= 7) text.push_back(static_cast<char>(left | 0x80));
  text.push_back(static_cast<char>(left));
  return text + bytes;
}

TEST(RequestBoundsTest, ElementsToBeParsedAreForSmallRequestsHoweverLargeTheModel) {
  ServedModel model;
  model.max_batch_tokens = 4096;
  model.hidden = 7168;
  model.topk = 256;
  const RequestLimits limits = RequestLimitsOf(model);
  EXPECT_EQ(limits.max_int_bytes, 4u << 20);
  EXPECT_EQ(limits.max_parsed_fp32_bytes, 4u << 20);
  EXPECT_EQ(limits.max_fp32_bytes, 4096u * (7168 + 256) * 4);
  model.max_batch_tokens = 2;
  EXPECT_EQ(RequestLimitsOf(model).max_parsed_fp32_bytes, 2u * (7168 + 256) * 4);
}

TEST(RequestBoundsTest, EachBoundPassesAtItsLimitAndRefusesPastItByName) {
  const RequestLimits limits = Limits();
  ASSERT_EQ(limits.max_int_bytes, 16u * 2 * 10);
  ASSERT_EQ(limits.max_fp32_bytes, 16u * (4 + 2) * 4);
  const auto in_contents = [](int number, std::size_t size) {
    return Field(5, Field(5, Field(number, std::string(size, '\1'))));
  };
  const std::string parameter = Field(1, "p") + Field(2, std::string("\x10\1"));
  struct Case {
    std::function<std::string(int)> message;  // with so many more than the limit
    const char* words;
  };
  const Case cases[] = {
      {[](int more) { return Times(16 + more, Field(5, "")); }, "16 inputs"},
      {[](int more) { return Times(16 + more, Field(6, "")); }, "16 outputs"},
      {[](int more) { return Times(16 + more, Field(7, "")); }, "16 raw_input_contents"},
      {[&](int more) { return Times(64 + more, Field(4, parameter)); }, "64 parameters"},
      {[&](int more) { return Field(5, Times(64 + more, Field(4, parameter))); },
       "64 tensor parameters"},
      {[&](int more) { return Field(6, Times(64 + more, Field(2, parameter))); },
       "64 tensor parameters"},
      {[](int more) { return Field(5, Field(5, Times(16 + more, Field(8, "")))); },
       "16 bytes_contents"},
      {[&](int more) { return in_contents(2, 320 + more); }, "320 bytes of int_contents"},
      {[&](int more) { return in_contents(3, 320 + more); }, "320 bytes of int_contents"},
      {[&](int more) { return in_contents(2, 160) + in_contents(3, 160 + more); },
       "320 bytes of int_contents"},
      {[&](int more) { return in_contents(6, 384 + more); }, "384 bytes of fp32_contents;"},
      {[&](int more) { return in_contents(6, 200) + in_contents(6, 184 + more); },
       "384 bytes of fp32_contents;"},
      // What has to be parsed: in several fields of an input, and in small ones.
      {[&](int more) {
         const auto part = [](int size) { return Field(6, std::string(size, '\1')); };
         return Field(5, Field(5, part(100) + part(100 + 4 * more)));
       },
       "200 bytes of fp32_contents that are not one packed field"},
      {[&](int more) {
         const auto part = [](int size) { return Field(5, Field(6, std::string(size, '\1'))); };
         return Field(5, part(100) + part(100 + 4 * more));
       },
       "200 bytes of fp32_contents that are not one packed field"},
      {[&](int more) {
         return in_contents(6, 120) + in_contents(6, 96) + in_contents(6, 96) +
                in_contents(6, 8 + 4 * more);
       },
       "200 bytes of fp32_contents that are not one packed field"},
      // Fields that nobody knows, of each kind and on each level.
      {[](int more) { return Times(300 + more, Field(15, "")); }, "300 fields"},
      {[](int more) { return Times(300 + more, std::string("\x78\1")); }, "300 fields"},
      {[](int more) { return Times(300 + more, std::string("\x7d") + "abcd"); }, "300 fields"},
      {[](int more) { return Field(5, Times(299 + more, Field(15, ""))); }, "300 fields"},
      {[](int more) { return Field(6, Times(299 + more, Field(15, ""))); }, "300 fields"},
      {[](int more) { return Field(5, Field(5, Times(298 + more, Field(15, "")))); }, "300 fields"},
      {[](int more) { return Field(4, Times(299 + more, Field(15, ""))); }, "300 fields"},
      {[](int more) { return Field(4, Field(2, Times(298 + more, Field(15, "")))); }, "300 fields"},
      {[](int more) { return Field(5, Field(5, Times(298 + more, std::string("\x18\1")))); },
       "300 fields (pack elements)"},
      // Text, and elements of types that no tensor has here. Two or three bytes are the head.
      {[](int more) { return Field(1, std::string(1997 + more, 'n')); }, "2000 bytes beside"},
      {[](int more) { return Field(15, std::string(1997 + more, 'n')); }, "2000 bytes beside"},
      {[](int more) { return Field(4, Field(1, std::string(1994 + more, 'n'))); },
       "2000 bytes beside"},
      {[](int more) { return Field(5, Field(3, std::string(1994 + more, '\1'))); },
       "2000 bytes beside"},
      {[&](int more) { return in_contents(5, 1991 + more); }, "2000 bytes beside"},
      {[&](int more) {
         return Field(7, std::string(100'000, 'r')) + Field(3, std::string(1993 + more, 'i'));
       },
       "2000 bytes beside"}};
  for (std::size_t i = 0; i < std::size(cases); ++i) {
    SCOPED_TRACE(testing::Message() << "case " << i << ", " << cases[i].words);
    for (const std::size_t slice_bytes : {std::size_t{3}, std::size_t{1'000'000}}) {
      EXPECT_TRUE(Look(cases[i].message(0), limits, slice_bytes).ok())
          << Look(cases[i].message(0), limits, slice_bytes).status();
      const auto refused = Look(cases[i].message(1), limits, slice_bytes);
      EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(refused.status().message()), HasSubstr(cases[i].words));
    }
  }
}

TEST(RequestBoundsTest, WhatComesAfterABoundIsNotLookedAt) {
  // Were it read on, it would be found to be no message.
  const auto refused = Look(Times(17, Field(5, "")) + "\xff\xff\xff", Limits());
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("16 inputs"));
}

TEST(RequestBoundsTest, LargestBatchOfTheModelIsWithinThemInEitherForm) {
  const ServedModel model = TestModel();
  ModelInferRequest typed;
  for (const char* name : {"hidden_states", "topk_ids", "topk_weights"}) {
    typed.add_inputs()->set_name(name);
  }
  ModelInferRequest raw = typed;
  for (std::int64_t i = 0; i < model.max_batch_tokens * model.hidden; ++i) {
    typed.mutable_inputs(0)->mutable_contents()->add_fp32_contents(1.5f);
  }
  for (std::int64_t i = 0; i < model.max_batch_tokens * model.topk; ++i) {
    typed.mutable_inputs(1)->mutable_contents()->add_int_contents(-1);
    typed.mutable_inputs(2)->mutable_contents()->add_fp32_contents(0.5f);
  }
  const auto of_typed = Look(typed.SerializeAsString(), RequestLimitsOf(model));
  ASSERT_TRUE(of_typed.ok()) << of_typed.status();
  EXPECT_EQ(of_typed->raw_contents, 0u);
  EXPECT_TRUE(of_typed->large.empty()) << "it is a small model";
  for (int i = 0; i < 3; ++i) raw.add_raw_input_contents(std::string(100'000, 'x'));
  const auto of_raw = Look(raw.SerializeAsString(), RequestLimitsOf(model));
  ASSERT_TRUE(of_raw.ok()) << of_raw.status();
  EXPECT_EQ(of_raw->raw_contents, 3u);
  EXPECT_EQ(of_raw->large.size(), 3u);
}

TEST(RequestBoundsTest, BytesThatAreNoMessageAndGroupsAreRefused) {
  for (const std::string& bytes : {std::string(1, '\0'), std::string("\x7b\x7c"),
                                   std::string("\x0a\x05"
                                               "ab")}) {
    const auto refused = Look(bytes, Limits());
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr("not a ModelInferRequest"));
  }
}

}  // namespace
}  // namespace epserve::coordinator
