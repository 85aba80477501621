// A HuggingFace checkpoint directory's tensors by name: one `model.safetensors`, or where that is
// not there the shards that `model.safetensors.index.json` lists. A shard's name must be a plain
// file name, so that an index cannot lead out of the directory.
//
// Thread safety: immutable after Open; Read may be called from several threads.
#ifndef EPSERVE_CLIENT_CPP_CHECKPOINT_FILES_H_
#define EPSERVE_CLIENT_CPP_CHECKPOINT_FILES_H_

#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/safetensors_file.h"
#include "client/cpp/tensor.h"

namespace epserve::client {

class CheckpointFiles {
 public:
  // NOT_FOUND: neither file, or a shard is missing. DATA_LOSS: damaged, or the index and the shards
  // disagree.
  static absl::StatusOr<std::unique_ptr<CheckpointFiles>> Open(const std::string& directory);

  // Null if there is no such tensor. Lives as long as this object.
  const TensorEntry* Find(const std::string& name) const;
  absl::StatusOr<Tensor> Read(const std::string& name) const;
  // Read, and refuse another shape than [rows, columns]; DATA_LOSS naming both.
  absl::StatusOr<Tensor> ReadMatrix(const std::string& name, std::int64_t rows,
                                    std::int64_t columns) const;

 private:
  explicit CheckpointFiles(std::string directory) : directory_(std::move(directory)) {}
  absl::Status OpenIndex(const std::string& index_path);

  std::string directory_;
  std::map<std::string, std::unique_ptr<SafetensorsFile>> files_;  // by file name
  std::map<std::string, const SafetensorsFile*> file_of_tensor_;
};

// The whole text of a file of at most `max_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, std::size_t max_bytes);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CHECKPOINT_FILES_H_
