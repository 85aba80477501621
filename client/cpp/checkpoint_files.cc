#include "client/cpp/checkpoint_files.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

// The index of the largest public checkpoints is below 10 MB.
constexpr std::size_t kMaxIndexBytes = 256u << 20;

bool Exists(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0;
}

bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

}  // namespace

absl::StatusOr<std::string> ReadTextFile(const std::string& path, std::size_t max_bytes) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    return absl::NotFoundError(absl::StrCat("checkpoint: read '", path, "': ", strerror(errno)));
  }
  if (!S_ISREG(info.st_mode) || static_cast<std::uint64_t>(info.st_size) > max_bytes) {
    return absl::DataLossError(absl::StrCat("checkpoint: file '", path, "' of ", info.st_size,
                                            " bytes is not a regular file of at most ", max_bytes));
  }
  std::ifstream stream(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (stream.bad()) return absl::UnknownError(absl::StrCat("checkpoint: read '", path, "' failed"));
  return text;
}

absl::StatusOr<std::unique_ptr<CheckpointFiles>> CheckpointFiles::Open(
    const std::string& directory) {
  std::unique_ptr<CheckpointFiles> files(new CheckpointFiles(directory));
  // The single file first, as the service and the original loaders do; one that is there and cannot
  // be read is not passed over.
  auto single = SafetensorsFile::Open(directory + "/model.safetensors");
  if (single.ok()) {
    for (const auto& [name, entry] : (*single)->entries()) {
      files->file_of_tensor_[name] = single->get();
    }
    files->files_.emplace("model.safetensors", *std::move(single));
    return files;
  }
  if (!absl::IsNotFound(single.status())) return single.status();
  const std::string index = directory + "/model.safetensors.index.json";
  if (!Exists(index)) {
    return absl::NotFoundError(absl::StrCat("checkpoint: directory '", directory,
                                            "' holds neither model.safetensors nor "
                                            "model.safetensors.index.json"));
  }
  EPC_RETURN_IF_ERROR(files->OpenIndex(index));
  return files;
}

absl::Status CheckpointFiles::OpenIndex(const std::string& index_path) {
  EPC_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path, kMaxIndexBytes));
  const nlohmann::json root = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto map = root.is_object() ? root.find("weight_map") : root.end();
  if (!root.is_object() || map == root.end() || !map->is_object()) {
    return absl::DataLossError(
        absl::StrCat("checkpoint: index '", index_path, "' has no weight_map object"));
  }
  for (const auto& item : map->items()) {
    if (!item.value().is_string() || !IsPlainFileName(item.value().get<std::string>())) {
      return absl::DataLossError(absl::StrCat("checkpoint: index '", index_path, "' puts tensor '",
                                              item.key(), "' into ", item.value().dump(),
                                              ", which is not a plain file name"));
    }
    const std::string shard = item.value().get<std::string>();
    if (files_.find(shard) == files_.end()) {
      EPC_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(directory_ + "/" + shard));
      files_.emplace(shard, std::move(file));
    }
    const SafetensorsFile* file = files_.at(shard).get();
    if (file->entries().find(item.key()) == file->entries().end()) {
      return absl::DataLossError(absl::StrCat("checkpoint: tensor '", item.key(),
                                              "' is not in shard '", shard,
                                              "', where the index puts it"));
    }
    file_of_tensor_[item.key()] = file;
  }
  return absl::OkStatus();
}

const TensorEntry* CheckpointFiles::Find(const std::string& name) const {
  const auto found = file_of_tensor_.find(name);
  return found == file_of_tensor_.end() ? nullptr : &found->second->entries().at(name);
}

absl::StatusOr<Tensor> CheckpointFiles::Read(const std::string& name) const {
  const auto found = file_of_tensor_.find(name);
  if (found == file_of_tensor_.end()) {
    return absl::NotFoundError(
        absl::StrCat("checkpoint: tensor '", name, "' is not in directory '", directory_, "'"));
  }
  return found->second->Read(name);
}

absl::StatusOr<Tensor> CheckpointFiles::ReadMatrix(const std::string& name, std::int64_t rows,
                                                   std::int64_t columns) const {
  EPC_ASSIGN_OR_RETURN(Tensor tensor, Read(name));
  const std::vector<std::int64_t> expected = {rows, columns};
  if (tensor.shape != expected) {
    return absl::DataLossError(absl::StrCat("checkpoint: tensor '", name, "' in directory '",
                                            directory_, "' has shape ", ShapeString(tensor.shape),
                                            ", not ", ShapeString(expected)));
  }
  if (!IsConvertible(tensor.type)) {
    return absl::DataLossError(
        absl::StrCat("checkpoint: tensor '", name, "' in directory '", directory_, "' is of type ",
                     SafetensorsName(tensor.type), ", which is not one of weights"));
  }
  return tensor;
}

}  // namespace epserve::client
