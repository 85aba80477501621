// Requests whose contents, values or places in shared memory are wrong.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/server/coordinator/front_door/request_validation_fixture.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;

constexpr float kInf = std::numeric_limits<float>::infinity();

class BadContentsTest : public BadRequestTest {};

TEST_P(BadContentsTest, IsRefusedNamingWhatIsWrong) { ExpectRefusal(); }

void SetIds(TestRequest& request, std::vector<std::int32_t> ids) { request.raw[1] = BytesOf(ids); }
void SetWeights(TestRequest& request, std::vector<float> weights) {
  request.raw[2] = BytesOf(weights);
}

INSTANTIATE_TEST_SUITE_P(
    Contents, BadContentsTest,
    testing::Values(BadCase{"HiddenBytesShort",
                            kInvalid,
                            {"hidden_states", "needs 48 bytes", "has 47"},
                            [](TestRequest& r) { r.raw[0].pop_back(); }},
                    BadCase{"IdBytesLong",
                            kInvalid,
                            {"topk_ids", "needs 24 bytes", "has 25"},
                            [](TestRequest& r) { r.raw[1] += 'x'; }},
                    BadCase{"WeightBytesEmpty",
                            kInvalid,
                            {"topk_weights", "needs 24 bytes", "has 0"},
                            [](TestRequest& r) { r.raw[2].clear(); }},
                    BadCase{"NoContentsAtAll",
                            kInvalid,
                            {"hidden_states", "needs 48 bytes", "has 0"},
                            [](TestRequest& r) { r.raw.clear(); }},
                    BadCase{"MissingRawEntry",
                            kInvalid,
                            {"missing", "2 for 3 inputs"},
                            [](TestRequest& r) { r.raw.pop_back(); }},
                    BadCase{"SurplusRawEntry",
                            kInvalid,
                            {"surplus", "4 for 3 inputs"},
                            [](TestRequest& r) { r.raw.push_back("x"); }},
                    BadCase{"SurplusEmptyRawEntry",
                            kInvalid,
                            {"surplus", "4 for 3 inputs"},
                            [](TestRequest& r) { r.raw.push_back(""); }},
                    BadCase{"RawAndTyped",
                            kInvalid,
                            {"topk_ids", "typed contents", "raw_input_contents"},
                            [](TestRequest& r) {
                              r.inputs[1].typed_kind = TypedKind::kInt32;
                              r.inputs[1].typed_bytes = r.raw[1];
                            }},
                    BadCase{"TypedBf16",
                            kInvalid,
                            {"hidden_states", "BF16", "raw_input_contents"},
                            [](TestRequest& r) {
                              r.inputs[0].datatype = "BF16";
                              r.inputs[0].typed_kind = TypedKind::kFp32;
                              r.raw.clear();
                            }},
                    BadCase{"TypedOfOtherKind",
                            kInvalid,
                            {"hidden_states", "FP32", "fp32_contents"},
                            [](TestRequest& r) {
                              r.inputs[0].typed_kind = TypedKind::kFp64;
                              r.raw.clear();
                            }},
                    BadCase{"TypedOfSeveralKinds",
                            kInvalid,
                            {"hidden_states", "another type"},
                            [](TestRequest& r) {
                              r.inputs[0].typed_kind = TypedKind::kSeveral;
                              r.raw.clear();
                            }},
                    BadCase{"TypedTooShort",
                            kInvalid,
                            {"hidden_states", "needs 48 bytes", "has 4"},
                            [](TestRequest& r) {
                              r.inputs[0].typed_kind = TypedKind::kFp32;
                              r.inputs[0].typed_bytes = "1234";
                              r.raw.clear();
                            }},
                    BadCase{"IdTooLarge",
                            kInvalid,
                            {"topk_ids[2,1] is 8", "[-1, 8)"},
                            [](TestRequest& r) {
                              SetIds(r, {0, 1, 2, 3, 4, 8});
                            }},
                    BadCase{"IdTooSmall",
                            kInvalid,
                            {"topk_ids[1,0] is -2", "[-1, 8)"},
                            [](TestRequest& r) {
                              SetIds(r, {0, 1, -2, 3, 4, 5});
                            }},
                    BadCase{"IdMinimal",
                            kInvalid,
                            {"topk_ids[0,0] is -2147483648"},
                            [](TestRequest& r) {
                              SetIds(r, {std::numeric_limits<std::int32_t>::min(), 1, 2, 3, 4, 5});
                            }},
                    BadCase{"Int64IdThatWrapsToAValidOne",
                            kInvalid,
                            {"topk_ids[0,1] is 4294967297"},
                            [](TestRequest& r) {
                              r.inputs[1].datatype = "INT64";
                              r.raw[1] = BytesOf(std::vector<std::int64_t>{
                                  0, (std::int64_t{1} << 32) + 1, 2, 3, 4, 5});
                            }},
                    BadCase{"WeightNan",
                            kInvalid,
                            {"topk_weights[1,1] is nan"},
                            [](TestRequest& r) {
                              SetWeights(r, {0, 0, 0, kNan, 0, 0});
                            }},
                    BadCase{"WeightInf",
                            kInvalid,
                            {"topk_weights[2,0] is inf"},
                            [](TestRequest& r) {
                              SetWeights(r, {0, 0, 0, 0, kInf, 0});
                            }},
                    BadCase{"WeightMinusInf",
                            kInvalid,
                            {"topk_weights[0,0] is -inf"},
                            [](TestRequest& r) {
                              SetWeights(r, {-kInf, 0, 0, 0, 0, 0});
                            }}),
    CaseName);

void PutHiddenInRegion(TestRequest& request, std::vector<ParameterView> window) {
  request.inputs[0].parameters = std::move(window);
  request.raw.erase(request.raw.begin());
}

void AskForOutput(TestRequest& request, std::vector<ParameterView> window) {
  request.outputs = {{"hidden_states", std::move(window)}};
}

INSTANTIATE_TEST_SUITE_P(
    SharedMemory, BadContentsTest,
    testing::Values(
        BadCase{"UnknownRegion",
                StatusCode::kNotFound,
                {"'nowhere'"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(48, 0, "nowhere")); }},
        BadCase{"UnknownOutputRegion",
                StatusCode::kNotFound,
                {"'nowhere'"},
                [](TestRequest& r) { AskForOutput(r, Window(48, 0, "nowhere")); }},
        BadCase{"InputPastTheRegion",
                kInvalid,
                {"offset 209", "size 48", "256 bytes"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(48, 209)); }},
        BadCase{"InputOffsetThatWraps",
                kInvalid,
                {"256 bytes"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(48, kInt64Max)); }},
        BadCase{"InputOffsetNegative",
                kInvalid,
                {"shared_memory_offset -1", "negative"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(48, -1)); }},
        BadCase{"InputSizeNegative",
                kInvalid,
                {"shared_memory_byte_size -48"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(-48)); }},
        BadCase{"InputSizeZero",
                kInvalid,
                {"shared_memory_byte_size 0"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(0)); }},
        BadCase{"InputSizeOff",
                kInvalid,
                {"needs 48 bytes", "has 49 in shared memory"},
                [](TestRequest& r) { PutHiddenInRegion(r, Window(49)); }},
        BadCase{"InputSizeMissing",
                kInvalid,
                {"no shared_memory_byte_size"},
                [](TestRequest& r) {
                  PutHiddenInRegion(r, {{"shared_memory_region", std::string_view("region")}});
                }},
        BadCase{"InputSizeOfWrongType",
                kInvalid,
                {"'shared_memory_byte_size'", "uint64"},
                [](TestRequest& r) {
                  PutHiddenInRegion(r, {{"shared_memory_region", std::string_view("region")},
                                        {"shared_memory_byte_size", std::uint64_t{48}}});
                }},
        BadCase{"RegionOfWrongType",
                kInvalid,
                {"'shared_memory_region'", "int64", "string"},
                [](TestRequest& r) {
                  PutHiddenInRegion(r, {{"shared_memory_region", std::int64_t{1}}});
                }},
        BadCase{"SizeWithoutRegion",
                kInvalid,
                {"no shared_memory_region"},
                [](TestRequest& r) {
                  r.inputs[0].parameters = {{"shared_memory_byte_size", std::int64_t{48}}};
                }},
        BadCase{"UnknownTensorParameter",
                kInvalid,
                {"'binary_data_size'", "not known"},
                [](TestRequest& r) {
                  r.inputs[0].parameters = {{"binary_data_size", std::int64_t{48}}};
                }},
        BadCase{"SharedAndTyped",
                kInvalid,
                {"typed contents as well"},
                [](TestRequest& r) {
                  PutHiddenInRegion(r, Window(48));
                  r.inputs[0].typed_kind = TypedKind::kFp32;
                  r.inputs[0].typed_bytes = "1234";
                }},
        BadCase{"RawEntryForASharedInput",
                kInvalid,
                {"topk_ids", "needs 24 bytes", "has 48"},
                [](TestRequest& r) { r.inputs[0].parameters = Window(48); }},
        BadCase{"OutputWindowTooSmall",
                kInvalid,
                {"needs 48 bytes", "'region' has 47"},
                [](TestRequest& r) { AskForOutput(r, Window(47)); }},
        BadCase{"OutputWindowPastTheRegion",
                kInvalid,
                {"offset 200", "size 57", "256"},
                [](TestRequest& r) { AskForOutput(r, Window(57, 200)); }},
        BadCase{"OutputOffsetThatWraps",
                kInvalid,
                {"256"},
                [](TestRequest& r) { AskForOutput(r, Window(kInt64Max, kInt64Max)); }},
        BadCase{"UnknownOutput",
                kInvalid,
                {"'logits'", "hidden_states"},
                [](TestRequest& r) {
                  r.outputs = {{"logits", {}}};
                }},
        BadCase{"DuplicateOutput",
                kInvalid,
                {"hidden_states is asked for twice"},
                [](TestRequest& r) {
                  r.outputs = {{"hidden_states", {}}, {"hidden_states", {}}};
                }},
        BadCase{"TooManyOutputs",
                kInvalid,
                {"16 outputs"},
                [](TestRequest& r) {
                  r.outputs.assign(17, {"hidden_states", {}});
                }},
        BadCase{"Classification",
                kInvalid,
                {"'classification'", "not known"},
                [](TestRequest& r) {
                  AskForOutput(r, {{"classification", std::int64_t{3}}});
                }}),
    CaseName);

}  // namespace
}  // namespace epserve::coordinator
