#include "client/cpp/safetensors_file.h"

#include <sys/stat.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cpu_time.h"
#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

using ::testing::HasSubstr;

// A file of the given header text and data, its length field right.
std::string FileBytes(const std::string& header, const std::string& data) {
  const std::uint64_t size = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, 8);
  return bytes + header + data;
}

class SafetensorsFileTest : public ::testing::Test {
 protected:
  absl::Status OpenBytes(const std::string& bytes) {
    directory_.Write("x.safetensors", bytes);
    return SafetensorsFile::Open(directory_.File("x.safetensors")).status();
  }
  // The file is refused as damaged, by its name and for a reason that holds `what`.
  void ExpectDamaged(const std::string& bytes, const std::string& what) {
    const absl::Status status = OpenBytes(bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
    EXPECT_THAT(std::string(status.message()), HasSubstr("x.safetensors"));
  }

  TestDirectory directory_;
};

TEST_F(SafetensorsFileTest, WhatIsWrittenIsReadBack) {
  std::map<std::string, Tensor> tensors;
  tensors["a"] = MakeTensor(ElementType::kBf16, {2, 3}, {1, -2, 0.5, 0, 3, 256});
  tensors["empty"] = MakeTensor(ElementType::kF32, {0, 7}, {});
  tensors["ids"] = MakeTensor(ElementType::kI64, {3}, {-1, 0, 1 << 20});
  tensors["scalar"] = MakeTensor(ElementType::kF32, {}, {1.25});
  const std::string path = directory_.File("t.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, tensors).ok());
  const auto read = ReadSafetensors(path);
  ASSERT_TRUE(read.ok()) << read.status();
  ASSERT_EQ(read->size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(read->at(name).type, tensor.type) << name;
    EXPECT_EQ(read->at(name).shape, tensor.shape) << name;
    EXPECT_EQ(read->at(name).bytes, tensor.bytes) << name;
  }
  EXPECT_EQ(directory_.Read("t.safetensors").find("partial"), std::string::npos);
}

TEST_F(SafetensorsFileTest, DataBeginsAlignedToEightBytes) {
  for (const char* name : {"a", "ab", "abc", "abcd"}) {
    const std::string path = directory_.File("t.safetensors");
    ASSERT_TRUE(WriteSafetensors(path, {{name, MakeTensor(ElementType::kF32, {1}, {1})}}).ok());
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, directory_.Read("t.safetensors").data(), 8);
    EXPECT_EQ(header_bytes % 8, 0u);
  }
}

TEST_F(SafetensorsFileTest, MissingFileIsNotFoundByName) {
  const auto file = SafetensorsFile::Open(directory_.File("none.safetensors"));
  EXPECT_EQ(file.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("none.safetensors"));
}

TEST_F(SafetensorsFileTest, MissingTensorIsNotFoundByName) {
  directory_.Write("x.safetensors", FileBytes("{}", ""));
  const auto file = SafetensorsFile::Open(directory_.File("x.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status();
  const auto tensor = (*file)->Read("absent");
  EXPECT_EQ(tensor.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(tensor.status().message()), HasSubstr("absent"));
}

TEST_F(SafetensorsFileTest, EveryTruncationIsDamage) {
  const std::string whole =
      FileBytes(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  ASSERT_TRUE(OpenBytes(whole).ok());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_EQ(OpenBytes(whole.substr(0, size)).code(), absl::StatusCode::kDataLoss) << size;
  }
}

TEST_F(SafetensorsFileTest, HeaderLongerThanTheFileIsDamage) {
  std::string bytes = FileBytes("{}", "");
  bytes[0] = 100;
  ExpectDamaged(bytes, "header of 100 bytes");
  std::memset(bytes.data(), 0xff, 8);
  ExpectDamaged(bytes, "header of 18446744073709551615 bytes");
}

TEST_F(SafetensorsFileTest, HeaderThatIsNoObjectIsDamage) {
  ExpectDamaged(FileBytes("[1]", ""), "not a JSON object");
  ExpectDamaged(FileBytes("{\"a\":", ""), "not a JSON object");
  ExpectDamaged(FileBytes(std::string(5000, '['), ""), "not a JSON object");
}

TEST_F(SafetensorsFileTest, BadEntryIsDamageByTensorName) {
  const auto entry = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  ExpectDamaged(FileBytes(R"({"w":3})", ""), "'w' is not described by an object");
  ExpectDamaged(FileBytes(entry(R"("shape":[1],"data_offsets":[0,4])"), "1234"),
                "'w' has no dtype");
  ExpectDamaged(FileBytes(entry(R"("dtype":"F31","shape":[1],"data_offsets":[0,4])"), "1234"),
                "'w' has unknown dtype 'F31'");
  ExpectDamaged(FileBytes(entry(R"("dtype":"F32","data_offsets":[0,4])"), "1234"),
                "'w' has no shape");
  ExpectDamaged(FileBytes(entry(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), "1234"),
                "'w' has a shape");
  ExpectDamaged(FileBytes(entry(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"), "1234"),
                "'w' has a shape");
  ExpectDamaged(FileBytes(entry(R"("dtype":"F32","shape":[1],"data_offsets":[0])"), "1234"),
                "'w' has no data_offsets");
  ExpectDamaged(FileBytes(entry(R"("dtype":"F32","shape":[1],"data_offsets":[-4,0])"), "1234"),
                "'w' has no data_offsets");
}

TEST_F(SafetensorsFileTest, RangeOutsideTheFileIsDamage) {
  const auto file = [](const std::string& offsets) {
    return FileBytes(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":)" + offsets + "}}", "1234");
  };
  ExpectDamaged(file("[0,8]"), "outside");
  ExpectDamaged(file("[4,0]"), "outside");
  ExpectDamaged(file("[18446744073709551612,0]"), "outside");
}

TEST_F(SafetensorsFileTest, ShapeThatDoesNotFillTheRangeIsDamage) {
  const auto file = [](const std::string& shape) {
    return FileBytes(R"({"w":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":[0,4]}})",
                     "1234");
  };
  ExpectDamaged(file("[2]"), "does not fill");
  // The products wrap around to 1 and to 4 bytes in 64 bits.
  ExpectDamaged(file("[4294967296,4294967297]"), "does not fill");
  ExpectDamaged(file("[4611686018427387905]"), "does not fill");
}

TEST_F(SafetensorsFileTest, OverlapAndHoleAreDamage) {
  const auto file = [](const std::string& second, const std::string& data) {
    return FileBytes(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                     R"("b":{"dtype":"U8","shape":[4],"data_offsets":)" +
                         second + "}}",
                     data);
  };
  EXPECT_TRUE(OpenBytes(file("[4,8]", "12345678")).ok());
  ExpectDamaged(file("[2,6]", "123456"), "overlapping");
  ExpectDamaged(file("[5,9]", "123456789"), "leaving a hole");
  ExpectDamaged(file("[4,8]", "123456789"), "cover 8");
}

TEST_F(SafetensorsFileTest, NameGivenTwiceIsDamage) {
  ExpectDamaged(FileBytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                          R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
                          "12"),
                "'a' twice");
}

TEST_F(SafetensorsFileTest, FileThatShrinksAfterOpenIsDamageNotRubbish) {
  const std::string bytes =
      FileBytes(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  directory_.Write("x.safetensors", bytes);
  const auto file = SafetensorsFile::Open(directory_.File("x.safetensors"));
  ASSERT_TRUE(file.ok());
  std::filesystem::resize_file(directory_.File("x.safetensors"), bytes.size() - 1);
  EXPECT_EQ((*file)->Read("w").status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(SafetensorsFileTest, UnfinishedWriterLeavesNothing) {
  {
    auto writer = SafetensorsWriter::Create(directory_.File("t.safetensors"),
                                            {{"a", ElementType::kF32, {1}}});
    ASSERT_TRUE(writer.ok());
    EXPECT_EQ((*writer)->Append("123").code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ((*writer)->Finish().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
}

// Four times the tensors take about four times as long.
TEST(SafetensorsWriterTest, TimeIsLinearInTheNumberOfTensors) {
  const TestDirectory directory;
  const auto seconds = [&](int num_tensors) {
    std::vector<TensorSpec> specs;
    for (int i = 0; i < num_tensors; ++i) {
      specs.push_back({"model.layers.1.mlp.experts." + std::to_string(100'000 + i) + ".up",
                       ElementType::kF32,
                       {1, 1}});
    }
    return LeastCpuSeconds([&] {
      EXPECT_TRUE(SafetensorsWriter::Create(directory.File("x.safetensors"), specs).ok());
    });
  };
  EXPECT_LT(seconds(32'000), 7 * seconds(8'000));
}

TEST(SafetensorsWriterTest, FullDiskIsResourceExhausted) {
  const TestDirectory directory;
  std::filesystem::create_symlink("/dev/full", directory.File("full.safetensors"));
  const absl::Status status = WriteSafetensors(directory.File("full.safetensors"),
                                               {{"x", MakeTensor(ElementType::kF32, {1}, {1})}});
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_NE(status.message().find("No space left"), std::string::npos) << status;
  EXPECT_TRUE(std::filesystem::is_symlink(directory.File("full.safetensors")));
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/full"));
}

TEST(SafetensorsWriterTest, LinkIsFollowedAndStays) {
  const TestDirectory directory;
  directory.Write("target", "before");
  std::filesystem::create_symlink("target", directory.File("link"));
  const std::map<std::string, Tensor> tensors = {{"x", MakeTensor(ElementType::kF32, {1}, {1})}};
  ASSERT_TRUE(WriteSafetensors(directory.File("link"), tensors).ok());
  EXPECT_TRUE(std::filesystem::is_symlink(directory.File("link")));
  EXPECT_TRUE(ReadSafetensors(directory.File("target")).ok());
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 2);
}

TEST(SafetensorsWriterTest, PipeIsWrittenWhereItIs) {
  const TestDirectory directory;
  const std::string pipe = directory.File("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  std::string read;
  std::thread reader([&] {
    std::ifstream file(pipe, std::ios::binary);
    read.assign(std::istreambuf_iterator<char>(file), {});
  });
  const absl::Status status =
      WriteSafetensors(pipe, {{"x", MakeTensor(ElementType::kF32, {1}, {1})}});
  reader.join();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
  EXPECT_NE(read.find("\"x\""), std::string::npos);
}

}  // namespace
}  // namespace epserve::client
