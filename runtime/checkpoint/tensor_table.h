// Every tensor of a checkpoint directory by name: model.safetensors, or the shards that
// model.safetensors.index.json lists. Headers alone are read. Immutable once open, so thread-safe.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_TENSOR_TABLE_H_
#define EPSERVE_RUNTIME_CHECKPOINT_TENSOR_TABLE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "runtime/checkpoint/input_file.h"
#include "runtime/checkpoint/safetensors.h"

namespace epserve::runtime {

class TensorTable {
 public:
  struct Tensor {
    TensorEntry entry;
    int file = 0;  // index into files()
  };

  // Opens every file and checks every header. NOT_FOUND: no weights there, a shard that the index
  // lists is missing, or lacks a tensor that the index puts into it. DATA_LOSS: a damaged header or
  // index. INVALID_ARGUMENT: a shard outside the directory. Each names file and tensor.
  static absl::StatusOr<TensorTable> Open(const std::string& directory);

  // Null where there is no such tensor.
  const Tensor* Find(std::string_view name) const;

  const std::vector<InputFile>& files() const { return files_; }
  // Hands the open files over; the table is used no more.
  std::vector<InputFile> TakeFiles() && { return std::move(files_); }
  // What holds the tensors, for messages: the single file's name or the index's.
  const std::string& source() const { return source_; }

 private:
  // Opens one file; takes its tensors in if `only` is null, else those it maps to this file.
  absl::Status Add(const std::string& directory, const std::string& name,
                   const absl::flat_hash_map<std::string, std::string>* only);

  std::string source_;
  std::vector<InputFile> files_;
  absl::flat_hash_map<std::string, Tensor> tensors_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_TENSOR_TABLE_H_
