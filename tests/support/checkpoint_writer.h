// Small random checkpoints for tests, in the layouts that the reader knows, and their weights in
// fp64. Every value follows from the tensor's name, its index and a seed, so that nothing needs to
// be kept: files of any size are written in small pieces.
#ifndef EPSERVE_TESTS_SUPPORT_CHECKPOINT_WRITER_H_
#define EPSERVE_TESTS_SUPPORT_CHECKPOINT_WRITER_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/base/dtype.h"

namespace epserve::testing {

struct CheckpointSpec {
  std::string layout = "mixtral";                      // "qwen3_moe", "deepseek_v3"
  runtime::DataType dtype = runtime::DataType::kFp32;  // kFp8E4m3 comes with block scales
  std::int64_t hidden = 32;
  std::int64_t intermediate = 48;
  std::int64_t experts = 8;
  int topk = 2;
  std::int64_t moe_layers = 2;
  std::int64_t first_moe_layer = 0;  // dense ones before; Mixtral has none
  int shards = 1;
  bool router = true;
  bool renormalise = true;
  int groups = 1;
  int topk_groups = 1;
  double scaling = 1.0;
  std::uint64_t seed = 1;
};

// Writes config.json and the safetensors file or files into `directory`, which is created.
void WriteCheckpoint(const std::filesystem::path& directory, const CheckpointSpec& spec);

// "gate", "up" or "down" of an expert, [I, H] or [H, I], as the file's bytes say, in fp64.
std::vector<double> ReferenceWeight(const CheckpointSpec& spec, std::int64_t layer,
                                    std::int64_t expert, const std::string& projection);
std::vector<double> ReferenceGate(const CheckpointSpec& spec, std::int64_t layer);  // [E, H]
std::vector<double> ReferenceBias(const CheckpointSpec& spec, std::int64_t layer);  // [E]

// The name a projection's tensor has in the files.
std::string TensorName(const CheckpointSpec& spec, std::int64_t layer, std::int64_t expert,
                       const std::string& projection);
std::string GateTensorName(const CheckpointSpec& spec, std::int64_t layer);

// down(silu(gate(x)) * up(x)) of one expert in fp64.
std::vector<double> ReferenceExpertOutput(const CheckpointSpec& spec, std::int64_t layer,
                                          std::int64_t expert, const std::vector<double>& x);

// A directory of its own under the system's temporary one, removed with all in it.
class TempDirectory {
 public:
  TempDirectory();
  ~TempDirectory();
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::string ReadFileBytes(const std::filesystem::path& path);
void WriteFileBytes(const std::filesystem::path& path, const std::string& bytes);

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_SUPPORT_CHECKPOINT_WRITER_H_
