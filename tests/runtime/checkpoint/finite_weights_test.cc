// Weights that are no numbers are refused when they are loaded, with file, tensor and place.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "runtime/checkpoint/checkpoint.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::GateTensorName;
using ::epserve::testing::ReadFileBytes;
using ::epserve::testing::TempDirectory;
using ::epserve::testing::TensorName;
using ::epserve::testing::WriteCheckpoint;
using ::epserve::testing::WriteFileBytes;
using ::testing::HasSubstr;

constexpr char kFile[] = "model.safetensors";

class FiniteWeightsTest : public ::testing::TestWithParam<DataType> {
 protected:
  void SetUp() override {
    const bool fp8 = GetParam() == DataType::kFp8E4m3;
    spec_ = {.layout = fp8 ? "deepseek_v3" : "mixtral", .dtype = GetParam()};
    spec_.first_moe_layer = fp8 ? 1 : 0;
    spec_.hidden = 160;
    spec_.intermediate = 300;
    WriteCheckpoint(path(), spec_);
  }
  std::filesystem::path path() const { return directory_.path() / "model"; }

  // Puts `bytes` in the place of the tensor's element `index`.
  void Put(const std::string& tensor, std::size_t index, const std::string& bytes) {
    std::string file = ReadFileBytes(path() / kFile);
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
    const nlohmann::json header = nlohmann::json::parse(file.substr(8, header_bytes));
    const auto begin = header.at(tensor).at("data_offsets").at(0).get<std::size_t>();
    file.replace(8 + header_bytes + begin + index * bytes.size(), bytes.size(), bytes);
    WriteFileBytes(path() / kFile, file);
  }
  static std::string Nan(DataType type) {
    std::string bytes(DataTypeBytes(type), '\0');
    ConvertFromFloat(type, std::vector<float>{std::nanf("")}.data(), bytes.data(), 1);
    return bytes;
  }
  std::unique_ptr<Checkpoint> Open() {
    auto checkpoint = Checkpoint::Open(path().string());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return *std::move(checkpoint);
  }
  static void ExpectNamed(const absl::Status& status, const std::string& tensor,
                          const std::string& place) {
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    for (const std::string& part : {std::string(kFile), "\"" + tensor + "\"", place}) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    }
  }
  // Of the last layer's expert 5, down: [160, 300].
  absl::Status LoadDown(const Checkpoint& checkpoint) {
    const auto held = checkpoint.LoadExpertRange(5, 1, nullptr);
    const Checkpoint::StoredMatrix stored =
        checkpoint.Describe(1, 5, Checkpoint::ExpertMatrix::kDown);
    std::vector<char> data(stored.bytes);
    std::vector<char> scales(stored.scale_bytes);
    const absl::Status read =
        checkpoint.ReadStored(1, 5, Checkpoint::ExpertMatrix::kDown, data.data(), scales.data());
    EXPECT_EQ(held.status(), read);
    return read;
  }

  TempDirectory directory_;
  CheckpointSpec spec_;
};

TEST_P(FiniteWeightsTest, NanInAnExpertIsNamedWithItsPlace) {
  const std::string tensor = TensorName(spec_, spec_.first_moe_layer + 1, 5, "down");
  ASSERT_TRUE(LoadDown(*Open()).ok());
  for (const std::size_t index : {std::size_t{0}, std::size_t{301}, std::size_t{160 * 300 - 1}}) {
    WriteCheckpoint(path(), spec_);
    Put(tensor, index, Nan(GetParam()));
    ExpectNamed(
        LoadDown(*Open()), tensor,
        "nan at [" + std::to_string(index / 300) + ", " + std::to_string(index % 300) + "]");
  }
  // Who does not hold that expert does not read it.
  EXPECT_TRUE(Open()->LoadExpertRange(0, 5, nullptr).ok());
}

TEST_P(FiniteWeightsTest, InfIsNamedToo) {
  if (GetParam() == DataType::kFp8E4m3) GTEST_SKIP() << "fp8 e4m3 has no Inf";
  const std::string tensor = TensorName(spec_, spec_.first_moe_layer + 1, 5, "down");
  std::string bytes(DataTypeBytes(GetParam()), '\0');
  const float inf = -std::numeric_limits<float>::infinity();
  ConvertFromFloat(GetParam(), &inf, bytes.data(), 1);
  Put(tensor, 7, bytes);
  ExpectNamed(LoadDown(*Open()), tensor, "-inf at [0, 7]");
}

TEST_P(FiniteWeightsTest, NanInAScaleIsNamedWithItsPlace) {
  if (GetParam() != DataType::kFp8E4m3) GTEST_SKIP() << "only fp8 weights have scales";
  const std::string tensor = TensorName(spec_, spec_.first_moe_layer + 1, 5, "down") + "_scale_inv";
  Put(tensor, 4, Nan(DataType::kFp32));  // [2, 3]
  ExpectNamed(LoadDown(*Open()), tensor, "nan at [1, 1]");
}

TEST_P(FiniteWeightsTest, NanInARouterIsNamed) {
  const std::string tensor = GateTensorName(spec_, spec_.first_moe_layer);
  const DataType stored = GetParam() == DataType::kFp8E4m3 ? DataType::kBf16 : GetParam();
  Put(tensor, 161, Nan(stored));
  ExpectNamed(Open()->LoadRouter(0).status(), tensor, "nan at [1, 1]");
}

INSTANTIATE_TEST_SUITE_P(Types, FiniteWeightsTest,
                         ::testing::Values(DataType::kFp32, DataType::kFp16, DataType::kBf16,
                                           DataType::kFp8E4m3),
                         [](const auto& info) { return std::string(DataTypeName(info.param)); });

}  // namespace
}  // namespace epserve::runtime
