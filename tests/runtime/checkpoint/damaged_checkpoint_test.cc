// Every kind of damage is refused when the checkpoint is opened, with the file and the tensor
// named.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "runtime/checkpoint/checkpoint.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::ReadFileBytes;
using ::epserve::testing::TempDirectory;
using ::epserve::testing::TensorName;
using ::epserve::testing::WriteCheckpoint;
using ::epserve::testing::WriteFileBytes;
using ::testing::HasSubstr;
using Code = absl::StatusCode;

std::uint64_t HeaderLength(const std::string& file) {
  std::uint64_t length = 0;
  for (std::size_t i = 8; i > 0; --i)
    length = length << 8 | static_cast<unsigned char>(file[i - 1]);
  return length;
}

std::string WithLength(std::uint64_t length) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(length >> (8 * i));
  return bytes;
}

class DamagedCheckpointTest : public ::testing::Test {
 protected:
  void Write(const CheckpointSpec& spec) {
    spec_ = spec;
    WriteCheckpoint(path(), spec);
  }
  std::filesystem::path path() const { return directory_.path() / "model"; }
  std::string Name(std::int64_t layer, std::int64_t expert, const std::string& projection) const {
    return TensorName(spec_, layer, expert, projection);
  }

  void EditConfig(const std::function<void(nlohmann::json&)>& edit) {
    nlohmann::json config = nlohmann::json::parse(ReadFileBytes(path() / "config.json"));
    edit(config);
    WriteFileBytes(path() / "config.json", config.dump());
  }
  void EditHeader(const std::string& name, const std::function<void(nlohmann::json&)>& edit) {
    const std::string file = ReadFileBytes(path() / name);
    const std::uint64_t length = HeaderLength(file);
    nlohmann::json header = nlohmann::json::parse(file.substr(8, length));
    edit(header);
    ReplaceHeader(name, header.dump());
  }
  void ReplaceHeader(const std::string& name, const std::string& json) {
    const std::string file = ReadFileBytes(path() / name);
    WriteFileBytes(path() / name,
                   WithLength(json.size()) + json + file.substr(8 + HeaderLength(file)));
  }

  void ExpectRefused(Code code, const std::vector<std::string>& parts) {
    const auto info = ReadModelInfo(path().string());
    ASSERT_FALSE(info.ok());
    EXPECT_EQ(info.status().code(), code) << info.status();
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(info.status().message()), HasSubstr(part));
    }
  }

  TempDirectory directory_;
  CheckpointSpec spec_;
  const std::string single_ = "model.safetensors";
};

TEST_F(DamagedCheckpointTest, MissingDirectoryConfigOrWeightsIsNotFound) {
  ExpectRefused(Code::kNotFound, {path().string()});
  Write({});
  std::filesystem::remove(path() / single_);
  ExpectRefused(Code::kNotFound, {single_, "model.safetensors.index.json"});
  Write({});
  std::filesystem::remove(path() / "config.json");
  ExpectRefused(Code::kNotFound, {"config.json"});
}

TEST_F(DamagedCheckpointTest, ConfigThatIsRefusedIsNamedWithItsDirectory) {
  Write({});
  EditConfig([](nlohmann::json& config) { config["hidden_size"] = 0; });
  ExpectRefused(Code::kInvalidArgument, {path() / "config.json", "hidden_size"});
}

TEST_F(DamagedCheckpointTest, TruncatedFileIsDataLoss) {
  Write({});
  const std::string file = ReadFileBytes(path() / single_);
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{8}, std::size_t{100},
                                 file.size() / 2, file.size() - 1}) {
    SCOPED_TRACE(size);
    WriteFileBytes(path() / single_, file.substr(0, size));
    ExpectRefused(Code::kDataLoss, {single_});
  }
  // Cut in the data, the header is whole and says whose bytes are gone.
  ExpectRefused(Code::kDataLoss, {"model.layers.", "tensor"});
}

TEST_F(DamagedCheckpointTest, HeaderLongerThanTheFileIsDataLoss) {
  Write({});
  const std::string file = ReadFileBytes(path() / single_);
  for (const std::uint64_t length :
       {static_cast<std::uint64_t>(file.size()) - 7, std::uint64_t{1} << 32, ~std::uint64_t{0}}) {
    WriteFileBytes(path() / single_, WithLength(length) + file.substr(8));
    ExpectRefused(Code::kDataLoss, {single_, "longer than the file", std::to_string(length)});
  }
}

TEST_F(DamagedCheckpointTest, HeaderThatIsNoJsonObjectIsDataLoss) {
  Write({});
  for (const char* json : {"", "[]", "\"x\"", "{", "{\"a\":}", "nonsense", "{}x", "{\"a\":{}}",
                           "{\"a\":[1]}", "{\"__metadata__\":3}", "{\"\xff\":{}}"}) {
    SCOPED_TRACE(json);
    ReplaceHeader(single_, json);
    ExpectRefused(Code::kDataLoss, {single_});
  }
}

TEST_F(DamagedCheckpointTest, OverlappingOffsetsAreDataLoss) {
  Write({});
  const std::string name = Name(0, 1, "up");
  EditHeader(single_, [&](nlohmann::json& header) {
    header[name]["data_offsets"] = header[Name(0, 0, "gate")]["data_offsets"];
  });
  ExpectRefused(Code::kDataLoss, {single_, "overlaps"});
}

TEST_F(DamagedCheckpointTest, OffsetsOutOfRangeAreDataLoss) {
  Write({});
  const std::string name = Name(1, 2, "down");
  const std::string file = ReadFileBytes(path() / single_);
  constexpr std::uint64_t kHuge = ~std::uint64_t{0};
  const std::vector<std::vector<std::uint64_t>> cases = {
      {0, kHuge}, {kHuge - 1, kHuge}, {kHuge, 0}, {8, 4}, {1u << 30, (1u << 30) + 6144},
      {0},        {0, 1, 2}};
  for (const auto& offsets : cases) {
    SCOPED_TRACE(offsets.front());
    WriteFileBytes(path() / single_, file);
    EditHeader(single_, [&](nlohmann::json& header) { header[name]["data_offsets"] = offsets; });
    ExpectRefused(Code::kDataLoss, {single_, name});
  }
}

TEST_F(DamagedCheckpointTest, HoleOrBytesOfNoTensorAreDataLoss) {
  Write({});
  EditHeader(single_, [&](nlohmann::json& header) { header.erase("model.embed_tokens.weight"); });
  ExpectRefused(Code::kDataLoss, {single_, "hole"});
  Write({});
  const std::string file = ReadFileBytes(path() / single_);
  WriteFileBytes(path() / single_, file + "more");
  ExpectRefused(Code::kDataLoss, {single_, "4 bytes"});
}

TEST_F(DamagedCheckpointTest, ShapeThatIsNotItsBytesIsDataLoss) {
  const std::vector<nlohmann::json> shapes = {{48, 31},
                                              {std::uint64_t{1} << 32, std::uint64_t{1} << 32},
                                              {std::uint64_t{1} << 62, 8, 0},
                                              // Four bytes times this is the tensor's size once
                                              // more, but for the overflow.
                                              {(std::uint64_t{1} << 62) + 48 * 32},
                                              {~std::uint64_t{0}},
                                              {-48, -32},
                                              {48.0, 32.0},
                                              {"48", "32"},
                                              {{48, 32}},
                                              {1, 1, 1, 1, 1, 1, 1, 48, 32}};
  for (const nlohmann::json& shape : shapes) {
    SCOPED_TRACE(shape.dump());
    Write({});
    const std::string name = Name(0, 3, "gate");
    EditHeader(single_, [&](nlohmann::json& header) { header[name]["shape"] = shape; });
    ExpectRefused(Code::kDataLoss, {single_, name});
  }
}

TEST_F(DamagedCheckpointTest, ShapeOtherThanTheConfigsIsInvalid) {
  Write({});
  const std::string name = Name(0, 3, "gate");
  EditHeader(single_, [&](nlohmann::json& header) { header[name]["shape"] = {32, 48}; });
  ExpectRefused(Code::kInvalidArgument, {single_, name, "[32, 48]", "[48, 32]"});
}

TEST_F(DamagedCheckpointTest, WrongDtypeIsInvalid) {
  Write({});
  const std::string name = Name(1, 0, "down");
  EditHeader(single_, [&](nlohmann::json& header) { header[name]["dtype"] = "I32"; });
  ExpectRefused(Code::kInvalidArgument, {single_, name, "I32"});
  EditHeader(single_, [&](nlohmann::json& header) { header[name]["dtype"] = "Q4"; });
  ExpectRefused(Code::kInvalidArgument, {single_, name, "Q4"});
}

TEST_F(DamagedCheckpointTest, RepeatedNameOrUnknownFieldIsDataLoss) {
  Write({});
  const std::string good = ReadFileBytes(path() / single_);
  const std::string json = good.substr(8, HeaderLength(good));
  const std::string entry = "\"twin\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},";
  ReplaceHeader(single_, "{" + entry + entry + json.substr(1));
  ExpectRefused(Code::kDataLoss, {single_, "twin", "twice"});
  WriteFileBytes(path() / single_, good);
  EditHeader(single_, [&](nlohmann::json& header) { header[Name(0, 0, "up")]["extra"] = 1; });
  ExpectRefused(Code::kDataLoss, {single_, Name(0, 0, "up"), "extra"});
}

TEST_F(DamagedCheckpointTest, MissingTensorIsNotFound) {
  Write({});
  EditHeader(single_, [&](nlohmann::json& header) {
    header["renamed"] = header[Name(1, 7, "down")];
    header.erase(Name(1, 7, "down"));
  });
  ExpectRefused(Code::kNotFound, {single_, Name(1, 7, "down")});
}

TEST_F(DamagedCheckpointTest, RouterOfSomeLayersOnlyIsNotFound) {
  Write({});
  const std::string gate = ::epserve::testing::GateTensorName(spec_, 1);
  EditHeader(single_, [&](nlohmann::json& header) {
    header["renamed"] = header[gate];
    header.erase(gate);
  });
  ExpectRefused(Code::kNotFound, {single_, gate});
}

TEST_F(DamagedCheckpointTest, Fp8WithoutScaleOrConfigIsRefused) {
  const CheckpointSpec fp8{.layout = "deepseek_v3", .dtype = DataType::kFp8E4m3};
  Write(fp8);
  const std::string scale = Name(0, 2, "up") + "_scale_inv";
  EditHeader(single_, [&](nlohmann::json& header) {
    header["renamed"] = header[scale];
    header.erase(scale);
  });
  ExpectRefused(Code::kNotFound, {single_, scale});
  Write(fp8);
  EditHeader(single_, [&](nlohmann::json& header) { header[scale]["shape"] = {1}; });
  ExpectRefused(Code::kInvalidArgument, {single_, scale, "[1, 1]"});
  Write(fp8);
  EditConfig([](nlohmann::json& config) { config.erase("quantization_config"); });
  ExpectRefused(Code::kInvalidArgument, {single_, Name(0, 0, "gate"), "quantization_config"});
}

class DamagedShardsTest : public DamagedCheckpointTest {
 protected:
  const std::string index_ = "model.safetensors.index.json";
  const std::string shard_ = "model-00002-of-00003.safetensors";

  void SetUp() override { Write({.layout = "qwen3_moe", .shards = 3}); }
  void EditIndex(const std::function<void(nlohmann::json&)>& edit) {
    nlohmann::json index = nlohmann::json::parse(ReadFileBytes(path() / index_));
    edit(index);
    WriteFileBytes(path() / index_, index.dump());
  }
};

TEST_F(DamagedShardsTest, MissingShardIsNotFound) {
  std::filesystem::remove(path() / shard_);
  ExpectRefused(Code::kNotFound, {shard_, index_});
}

TEST_F(DamagedShardsTest, DamagedShardIsNamed) {
  std::filesystem::resize_file(path() / shard_, std::filesystem::file_size(path() / shard_) - 1);
  ExpectRefused(Code::kDataLoss, {shard_, "model.layers."});
}

TEST_F(DamagedShardsTest, TensorThatItsShardLacksIsNotFound) {
  EditIndex([&](nlohmann::json& index) { index["weight_map"]["model.extra"] = shard_; });
  ExpectRefused(Code::kNotFound, {shard_, "model.extra", index_});
  EditIndex([&](nlohmann::json& index) {
    index["weight_map"].erase("model.extra");
    index["weight_map"].erase(Name(0, 0, "gate"));
  });
  ExpectRefused(Code::kNotFound, {Name(0, 0, "gate"), index_});
}

TEST_F(DamagedShardsTest, ShardNameThatLeavesTheDirectoryIsInvalid) {
  // The target is there and whole, so that only the name can be what is refused.
  std::filesystem::copy_file(path() / shard_, directory_.path() / "outside.safetensors");
  std::filesystem::create_directory(path() / "sub");
  std::filesystem::copy_file(path() / shard_, path() / "sub" / "inside.safetensors");
  const std::vector<std::string> names = {"../outside.safetensors",
                                          (directory_.path() / "outside.safetensors").string(),
                                          "sub/inside.safetensors",
                                          "sub/../" + shard_,
                                          "..",
                                          ".",
                                          "",
                                          std::string("a\0b", 3)};
  const std::string good = ReadFileBytes(path() / index_);
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    WriteFileBytes(path() / index_, good);
    EditIndex([&](nlohmann::json& index) {
      for (auto& [tensor, shard] : index["weight_map"].items()) {
        if (shard == shard_) shard = name;
      }
    });
    ExpectRefused(Code::kInvalidArgument, {"leaves the checkpoint directory", index_});
  }
}

// As in the hub's download cache, whose snapshots are links to blobs elsewhere.
TEST_F(DamagedShardsTest, LinkOutOfTheDirectoryIsFollowedAndItsTargetChecked) {
  std::filesystem::rename(path() / shard_, directory_.path() / "blob");
  std::filesystem::create_symlink("../blob", path() / shard_);
  EXPECT_TRUE(ReadModelInfo(path().string()).ok());
  WriteFileBytes(directory_.path() / "blob", "short");
  ExpectRefused(Code::kDataLoss, {shard_});
}

TEST_F(DamagedShardsTest, ShardThatIsNoRegularFileIsInvalid) {
  std::filesystem::remove(path() / shard_);
  std::filesystem::create_directory(path() / shard_);
  ExpectRefused(Code::kInvalidArgument, {shard_, "regular file"});
  std::filesystem::remove(path() / shard_);
  ASSERT_EQ(::mkfifo((path() / shard_).c_str(), 0600), 0);
  ExpectRefused(Code::kInvalidArgument, {shard_, "regular file"});
}

TEST_F(DamagedShardsTest, IndexThatIsNoMapIsDataLoss) {
  for (const char* json : {"", "[]", "{}", "{\"weight_map\":3}", "{\"weight_map\":{\"a\":1}}",
                           "{\"weight_map\":{\"a\":{}}}", "{\"weight_map\":[\"a\",\"b\"]}",
                           "{\"weight_map\":{\"a\":\"b\",\"a\":\"b\"}}", "{\"weight_map\":{}"}) {
    SCOPED_TRACE(json);
    WriteFileBytes(path() / index_, json);
    ExpectRefused(Code::kDataLoss, {index_});
  }
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  WriteFileBytes(path() / index_, "{\"x\":" + deep + ",\"weight_map\":{}}");
  ExpectRefused(Code::kDataLoss, {index_});
}

}  // namespace
}  // namespace epserve::runtime
