// Seeded mutations of good checkpoints. Whatever is done to a file, the reader either refuses it,
// saying which, or gives a description that keeps its promises; it never crashes, hangs or reads
// past a file's end (which the sanitizer builds would tell).
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <vector>

#include "runtime/checkpoint/checkpoint.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/safetensors.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

using ::epserve::testing::CheckpointSpec;
using ::epserve::testing::ReadFileBytes;
using ::epserve::testing::TempDirectory;
using ::epserve::testing::WriteCheckpoint;
using ::epserve::testing::WriteFileBytes;

#ifdef EPSERVE_SANITIZED
constexpr int kHeaderRounds = 4000;
constexpr int kDirectoryRounds = 400;
#else
constexpr int kHeaderRounds = 30000;
constexpr int kDirectoryRounds = 3000;
#endif

// Pieces that have hurt readers of JSON and of sizes before.
constexpr std::array<const char*, 26> kPieces = {"0",
                                                 "-1",
                                                 "18446744073709551615",
                                                 "9223372036854775808",
                                                 "4294967296",
                                                 "1e309",
                                                 "0.5",
                                                 "null",
                                                 "true",
                                                 "[]",
                                                 "{}",
                                                 "\"\"",
                                                 "[[[[[[[[",
                                                 "{\"a\":{\"a\":{\"a\":",
                                                 ",",
                                                 "]",
                                                 "}",
                                                 "\"",
                                                 "\\u0000",
                                                 "\xff\xfe",
                                                 "../../etc/passwd",
                                                 "/etc/passwd",
                                                 "\"dtype\":\"F64\",",
                                                 "\"shape\":[4294967296,4294967296],",
                                                 "\"data_offsets\":[0,0],",
                                                 "\"__metadata__\":{},"};

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::size_t Below(std::size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  // One to four changes, within the first `reach` bytes.
  std::string Mutate(std::string bytes, std::size_t reach) {
    for (std::size_t change = Below(4) + 1; change > 0; --change) {
      const std::size_t at = Below(std::min(reach, bytes.size()));
      switch (Below(7)) {
        case 0:
          if (!bytes.empty()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << Below(8)));
          break;
        case 1:
          if (!bytes.empty()) bytes[at] = static_cast<char>(random_());
          break;
        case 2:
          bytes.resize(at);
          break;
        case 3:
          bytes.insert(at, kPieces[Below(kPieces.size())]);
          break;
        case 4:
          bytes.erase(at, Below(40) + 1);
          break;
        case 5:
          bytes.insert(at, bytes.substr(Below(bytes.size()), Below(60)));
          break;
        default:
          ReplaceNumber(&bytes, at);
      }
    }
    return bytes;
  }

 private:
  void ReplaceNumber(std::string* bytes, std::size_t from) {
    constexpr const char* kDigits = "0123456789";
    const std::size_t begin = bytes->find_first_of(kDigits, from);
    if (begin == std::string::npos) return;
    std::size_t end = bytes->find_first_not_of(kDigits, begin);
    if (end == std::string::npos) end = bytes->size();
    bytes->replace(begin, end - begin, std::to_string(Below(3) == 0 ? random_() : Below(5000)));
  }

  std::mt19937_64 random_;
};

void ExpectRefusal(const absl::Status& status) {
  EXPECT_TRUE(status.code() == absl::StatusCode::kNotFound ||
              status.code() == absl::StatusCode::kInvalidArgument ||
              status.code() == absl::StatusCode::kDataLoss)
      << status;
  EXPECT_EQ(std::string(status.message()).rfind("checkpoint: ", 0), 0u) << status;
}

std::vector<CheckpointSpec> Specs() {
  CheckpointSpec mixtral{.hidden = 8, .intermediate = 6, .experts = 2, .topk = 1, .moe_layers = 1};
  CheckpointSpec qwen = mixtral;
  qwen.layout = "qwen3_moe";
  qwen.dtype = DataType::kBf16;
  qwen.shards = 3;
  CheckpointSpec deepseek = mixtral;
  deepseek.layout = "deepseek_v3";
  deepseek.dtype = DataType::kFp8E4m3;
  deepseek.first_moe_layer = 1;
  return {mixtral, qwen, deepseek};
}

TEST(CheckpointFuzzTest, MutatedHeaderIsRefusedOrKeepsItsPromises) {
  TempDirectory directory;
  WriteCheckpoint(directory.path() / "c", Specs()[2]);
  const std::string file = ReadFileBytes(directory.path() / "c" / "model.safetensors");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(file[i]);
  const std::string header = file.substr(8, length);
  int accepted = 0;
  for (int seed = 0; seed < kHeaderRounds; ++seed) {
    SCOPED_TRACE(seed);
    const std::string mutated =
        Mutator(static_cast<std::uint64_t>(seed)).Mutate(header, header.size());
    const std::uint64_t file_bytes = 8 + mutated.size() + (file.size() - 8 - length);
    const auto entries = ParseSafetensorsHeader(mutated, file_bytes, "fuzzed");
    if (!entries.ok()) {
      ExpectRefusal(entries.status());
      continue;
    }
    ++accepted;
    std::uint64_t end = 8 + mutated.size();
    for (const TensorEntry& entry : *entries) {
      EXPECT_EQ(entry.offset, end);
      end += entry.bytes;
    }
    EXPECT_EQ(end, file_bytes);
    if (::testing::Test::HasFailure()) return;
  }
  // Changes of names and padding go through; if nothing did, the corpus would test nothing.
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, kHeaderRounds / 2);
}

TEST(CheckpointFuzzTest, MutatedConfigIsRefusedOrSane) {
  for (const CheckpointSpec& spec : Specs()) {
    TempDirectory directory;
    WriteCheckpoint(directory.path() / "c", spec);
    const std::string config = ReadFileBytes(directory.path() / "c" / "config.json");
    for (int seed = 0; seed < kHeaderRounds / 3; ++seed) {
      SCOPED_TRACE(seed);
      const std::string mutated =
          Mutator(static_cast<std::uint64_t>(seed)).Mutate(config, config.size());
      const auto parsed = ParseModelConfig(mutated, "config.json");
      if (!parsed.ok()) {
        ExpectRefusal(parsed.status());
      } else {
        EXPECT_GE(parsed->hidden, 1);
        EXPECT_GE(parsed->intermediate, 1);
        EXPECT_LE(parsed->topk, parsed->num_experts);
        EXPECT_FALSE(parsed->layers.empty());
        EXPECT_TRUE(ValidateRouterConfig(parsed->router).ok());
      }
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(CheckpointFuzzTest, MutatedDirectoryIsRefusedOrLoads) {
  int loaded = 0;
  for (const CheckpointSpec& spec : Specs()) {
    TempDirectory directory;
    const auto path = directory.path() / "c";
    WriteCheckpoint(path, spec);
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());
    for (int seed = 0; seed < kDirectoryRounds / 3; ++seed) {
      SCOPED_TRACE(seed);
      Mutator mutator(static_cast<std::uint64_t>(seed));
      const auto& file = files[mutator.Below(files.size())];
      const std::string good = ReadFileBytes(file);
      // The length and the header are where a change means something.
      WriteFileBytes(file, mutator.Mutate(good, seed % 3 == 0 ? 16 : good.size()));
      const auto checkpoint = Checkpoint::Open(path.string());
      if (!checkpoint.ok()) {
        ExpectRefusal(checkpoint.status());
      } else {
        const auto weights =
            (*checkpoint)->LoadExpertRange(0, (*checkpoint)->info().num_experts, nullptr);
        // A weight may have become NaN or Inf.
        if (weights.ok()) {
          ++loaded;
        } else {
          ExpectRefusal(weights.status());
        }
      }
      WriteFileBytes(file, good);
      if (::testing::Test::HasFailure()) return;
    }
    EXPECT_TRUE(Checkpoint::Open(path.string()).ok());
  }
  EXPECT_GT(loaded, 0);
}

}  // namespace
}  // namespace epserve::runtime
