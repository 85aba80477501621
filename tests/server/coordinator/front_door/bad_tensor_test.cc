// Requests whose names, types or shapes are wrong.
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

constexpr std::int64_t kInt64Min = std::numeric_limits<std::int64_t>::min();

class BadTensorTest : public BadRequestTest {};

TEST_P(BadTensorTest, IsRefusedNamingWhatIsWrong) { ExpectRefusal(); }

INSTANTIATE_TEST_SUITE_P(Names, BadTensorTest,
                         testing::Values(BadCase{"UnknownModel",
                                                 StatusCode::kNotFound,
                                                 {"'other'", "'tiny'"},
                                                 [](TestRequest& r) { r.model_name = "other"; }},
                                         BadCase{"EmptyModel",
                                                 StatusCode::kNotFound,
                                                 {"''", "'tiny'"},
                                                 [](TestRequest& r) { r.model_name = ""; }},
                                         BadCase{"OtherVersion",
                                                 StatusCode::kNotFound,
                                                 {"'2'", "'1'", "'tiny'"},
                                                 [](TestRequest& r) { r.model_version = "2"; }},
                                         BadCase{"LayerBelow",
                                                 StatusCode::kNotFound,
                                                 {"layer 2", "3..5, 7"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"layer", std::int64_t{2}}};
                                                 }},
                                         BadCase{"LayerBetween",
                                                 StatusCode::kNotFound,
                                                 {"layer 6", "3..5, 7"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"layer", std::int64_t{6}}};
                                                 }},
                                         BadCase{"LayerNegative",
                                                 StatusCode::kNotFound,
                                                 {"layer -1"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"layer", std::int64_t{-1}}};
                                                 }},
                                         BadCase{
                                             "LayerOfWrongType",
                                             kInvalid,
                                             {"'layer'", "string", "int64"},
                                             [](TestRequest& r) {
                                               r.parameters = {{"layer", std::string_view("3")}};
                                             }},
                                         BadCase{"LayerOfDoubleType",
                                                 kInvalid,
                                                 {"'layer'", "double", "int64"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"layer", 3.0}};
                                                 }},
                                         BadCase{"LayerWithoutValue",
                                                 kInvalid,
                                                 {"'layer'", "no value"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"layer", std::monostate()}};
                                                 }},
                                         BadCase{"MisspeltLayer",
                                                 kInvalid,
                                                 {"'Layer'", "not known", "layer"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"Layer", std::int64_t{3}}};
                                                 }},
                                         BadCase{"NegativeTimeout",
                                                 kInvalid,
                                                 {"'timeout'", "-5"},
                                                 [](TestRequest& r) {
                                                   r.parameters = {{"timeout", std::int64_t{-5}}};
                                                 }},
                                         BadCase{"TooManyParameters",
                                                 kInvalid,
                                                 {"64 parameters"},
                                                 [](TestRequest& r) {
                                                   r.parameters.assign(65, {"triton_x", true});
                                                 }}),
                         CaseName);

INSTANTIATE_TEST_SUITE_P(
    Tensors, BadTensorTest,
    testing::Values(BadCase{"NoInputs",
                            kInvalid,
                            {"hidden_states is missing"},
                            [](TestRequest& r) {
                              r.inputs.clear();
                              r.raw.clear();
                            }},
                    BadCase{"HiddenMissing",
                            kInvalid,
                            {"hidden_states is missing"},
                            [](TestRequest& r) {
                              r.inputs.erase(r.inputs.begin());
                              r.raw.erase(r.raw.begin());
                            }},
                    BadCase{"IdsWithoutWeights",
                            kInvalid,
                            {"topk_weights is missing", "topk_ids is given"},
                            [](TestRequest& r) {
                              r.inputs.pop_back();
                              r.raw.pop_back();
                            }},
                    BadCase{"WeightsWithoutIds",
                            kInvalid,
                            {"topk_ids is missing", "topk_weights is given"},
                            [](TestRequest& r) {
                              r.inputs.erase(r.inputs.begin() + 1);
                              r.raw.erase(r.raw.begin() + 1);
                            }},
                    BadCase{"NeitherWithoutRouter",
                            kInvalid,
                            {"topk_ids and topk_weights", "no router"},
                            [](TestRequest& r) {
                              r.inputs.resize(1);
                              r.raw.resize(1);
                            }},
                    BadCase{"SurplusInput",
                            kInvalid,
                            {"'extra'", "surplus", "topk_ids"},
                            [](TestRequest& r) {
                              r.inputs.push_back({"extra", "FP32", {1}});
                            }},
                    BadCase{"DuplicateInput",
                            kInvalid,
                            {"topk_ids is given twice"},
                            [](TestRequest& r) { r.inputs.push_back(r.inputs[1]); }},
                    BadCase{"TooManyInputs",
                            kInvalid,
                            {"16 inputs"},
                            [](TestRequest& r) { r.inputs.assign(17, r.inputs[0]); }},
                    BadCase{"HiddenOfWrongType",
                            kInvalid,
                            {"hidden_states", "'FP64'", "BF16, FP16 or FP32"},
                            [](TestRequest& r) { r.inputs[0].datatype = "FP64"; }},
                    BadCase{"IdsOfWrongType",
                            kInvalid,
                            {"topk_ids", "'UINT32'", "INT32 or INT64"},
                            [](TestRequest& r) { r.inputs[1].datatype = "UINT32"; }},
                    BadCase{"WeightsOfWrongType",
                            kInvalid,
                            {"topk_weights", "'BF16'", "FP32"},
                            [](TestRequest& r) { r.inputs[2].datatype = "BF16"; }},
                    BadCase{"DatatypeInLowerCase",
                            kInvalid,
                            {"'fp32'"},
                            [](TestRequest& r) { r.inputs[0].datatype = "fp32"; }},
                    BadCase{"WrongHidden",
                            kInvalid,
                            {"hidden_states", "[3,5]", "[tokens,4]"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {3, 5};
                            }},
                    BadCase{"WrongTopk",
                            kInvalid,
                            {"topk_ids", "[3,3]", "[tokens,2]"},
                            [](TestRequest& r) {
                              r.inputs[1].shape = {3, 3};
                            }},
                    BadCase{"WrongTopkOfWeights",
                            kInvalid,
                            {"topk_weights", "[3,1]", "[tokens,2]"},
                            [](TestRequest& r) {
                              r.inputs[2].shape = {3, 1};
                            }},
                    BadCase{"NoDimensions",
                            kInvalid,
                            {"hidden_states", "[]"},
                            [](TestRequest& r) { r.inputs[0].shape = {}; }},
                    BadCase{"ThreeDimensions",
                            kInvalid,
                            {"hidden_states", "[1,3,4]"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {1, 3, 4};
                            }},
                    BadCase{"ManyDimensions",
                            kInvalid,
                            {"[1,1,1,1,1,1,1,1,...]"},
                            [](TestRequest& r) { r.inputs[0].shape.assign(100000, 1); }},
                    BadCase{"NegativeRows",
                            kInvalid,
                            {"hidden_states has -1 rows"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {-1, 4};
                            }},
                    BadCase{"NegativeColumns",
                            kInvalid,
                            {"[3,-4]"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {3, -4};
                            }},
                    BadCase{"MinimalRows",
                            kInvalid,
                            {"rows"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {kInt64Min, 4};
                            }},
                    BadCase{"RowsPast32Bits",
                            kInvalid,
                            {"4294967299 rows", "--max-batch-tokens 16"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {(std::int64_t{1} << 32) + 3, 4};
                            }},
                    BadCase{"ColumnsPast32Bits",
                            kInvalid,
                            {"[3,4294967300]"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {3, (std::int64_t{1} << 32) + 4};
                            }},
                    BadCase{"MaximalRows",
                            kInvalid,
                            {"--max-batch-tokens 16"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {kInt64Max, 4};
                            }},
                    BadCase{"TooManyTokens",
                            kInvalid,
                            {"hidden_states has 17 rows", "--max-batch-tokens 16"},
                            [](TestRequest& r) {
                              r.inputs[0].shape = {17, 4};
                            }},
                    BadCase{"RowsOfIdsDiffer",
                            kInvalid,
                            {"topk_ids has 2 rows", "hidden_states has 3"},
                            [](TestRequest& r) {
                              r.inputs[1].shape = {2, 2};
                            }},
                    BadCase{"RowsOfWeightsDiffer",
                            kInvalid,
                            {"topk_weights has 4 rows"},
                            [](TestRequest& r) {
                              r.inputs[2].shape = {4, 2};
                            }}),
    CaseName);

}  // namespace
}  // namespace epserve::coordinator
