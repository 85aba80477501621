#include "runtime/checkpoint/tensor_table.h"

#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "runtime/checkpoint/strict_json.h"

namespace epserve::runtime {
namespace {

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";
// DeepSeek-V3's index, with 91,991 tensors, is 9 MB.
constexpr std::uint64_t kMaxIndexBytes = 64 << 20;
// Each shard is an open file; DeepSeek-V3 has 163.
constexpr std::size_t kMaxShards = 900;

using WeightMap = absl::flat_hash_map<std::string, std::string>;

// Takes "weight_map" out of the index and passes over everything else.
class IndexReader final : public StrictJson {
 public:
  bool found() const { return found_; }
  WeightMap TakeMap() { return std::move(map_); }

  bool start_object(std::size_t) override {
    if (depth_ == 1 && in_map_) found_ = true;
    return Deeper("an object is not expected");
  }
  bool end_object() override { return Shallower(); }
  bool start_array(std::size_t) override { return Deeper("a list is not expected"); }
  bool end_array() override { return Shallower(); }

  bool key(string_t& name) override {
    if (depth_ == 1) {
      in_map_ = name == "weight_map";
      if (in_map_ && found_) return Fail("\"weight_map\" stands twice");
    }
    if (depth_ == 2 && in_map_) tensor_ = name;
    return true;
  }
  bool string(string_t& value) override {
    if (!in_map_) return true;
    if (depth_ != 2) return Fail("\"weight_map\" must map tensor names to file names");
    if (!map_.emplace(tensor_, value).second) {
      return Fail(absl::StrCat("tensor \"", ShownName(tensor_), "\" stands twice"));
    }
    return true;
  }

  bool null() override { return PassOver(); }
  bool boolean(bool) override { return PassOver(); }
  bool number_integer(number_integer_t) override { return PassOver(); }
  bool number_unsigned(number_unsigned_t) override { return PassOver(); }
  bool number_float(number_float_t, const string_t&) override { return PassOver(); }

 private:
  static constexpr int kMaxDepth = 16;

  bool PassOver() {
    return in_map_ ? Fail("\"weight_map\" must map tensor names to file names") : true;
  }
  bool Deeper(const char* message) {
    // The index is an object, and so is the map, with nothing nested in it.
    const bool map_entry = in_map_ && depth_ >= 2;
    if (map_entry || depth_ == kMaxDepth) return Fail(message);
    ++depth_;
    return true;
  }
  bool Shallower() {
    --depth_;
    return true;
  }

  int depth_ = 0;
  bool in_map_ = false;
  bool found_ = false;
  std::string tensor_;
  WeightMap map_;
};

absl::StatusOr<WeightMap> ReadIndex(const InputFile& file) {
  EPS_ASSIGN_OR_RETURN(const std::string text, file.ReadAll(kMaxIndexBytes));
  IndexReader reader;
  if (const std::string error = RunStrictJson(text, &reader); !error.empty()) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", file.name(), ": ", error));
  }
  if (!reader.found()) {
    return absl::DataLossError(
        absl::StrCat("checkpoint: ", file.name(), ": \"weight_map\" is missing"));
  }
  return reader.TakeMap();
}

}  // namespace

absl::StatusOr<TensorTable> TensorTable::Open(const std::string& directory) {
  TensorTable table;
  // As the original loaders do: the single file first.
  const absl::StatusOr<InputFile> single = InputFile::Open(directory, kSingleFile);
  if (single.ok()) {
    table.source_ = kSingleFile;
    EPS_RETURN_IF_ERROR(table.Add(directory, table.source_, nullptr));
    return table;
  }
  if (!absl::IsNotFound(single.status())) return single.status();
  const absl::StatusOr<InputFile> index = InputFile::Open(directory, kIndexFile);
  if (absl::IsNotFound(index.status())) {
    return absl::NotFoundError(absl::StrCat("checkpoint: ", directory, ": holds neither ",
                                            std::string(kSingleFile), " nor ",
                                            std::string(kIndexFile)));
  }
  if (!index.ok()) return index.status();
  EPS_ASSIGN_OR_RETURN(const WeightMap map, ReadIndex(*index));
  table.source_ = kIndexFile;
  std::set<std::string> shards;  // Ordered, so that the same damage gives the same message.
  for (const auto& [tensor, shard] : map) shards.insert(shard);
  if (shards.size() > kMaxShards) {
    return absl::InvalidArgumentError(absl::StrCat("checkpoint: ", table.source_, ": ",
                                                   shards.size(), " shards exceed the limit of ",
                                                   kMaxShards));
  }
  for (const std::string& shard : shards) {
    const absl::Status added = table.Add(directory, shard, &map);
    if (!added.ok()) {
      return absl::Status(added.code(), absl::StrCat(std::string(added.message()), " (listed in ",
                                                     table.source_, ")"));
    }
  }
  for (const auto& [tensor, shard] : map) {
    if (!table.tensors_.contains(tensor)) {
      return absl::NotFoundError(absl::StrCat("checkpoint: ", shard, ": tensor \"",
                                              ShownName(tensor), "\" is missing, though ",
                                              table.source_, " lists it there"));
    }
  }
  return table;
}

absl::Status TensorTable::Add(const std::string& directory, const std::string& name,
                              const WeightMap* only) {
  EPS_ASSIGN_OR_RETURN(InputFile file, InputFile::Open(directory, name));
  EPS_ASSIGN_OR_RETURN(std::vector<TensorEntry> entries, ReadSafetensorsHeader(file));
  const int index = static_cast<int>(files_.size());
  files_.push_back(std::move(file));
  for (TensorEntry& entry : entries) {
    if (only != nullptr) {
      const auto found = only->find(entry.name);
      if (found == only->end() || found->second != name) continue;
    }
    std::string key = entry.name;
    tensors_.emplace(std::move(key), Tensor{std::move(entry), index});
  }
  return absl::OkStatus();
}

const TensorTable::Tensor* TensorTable::Find(std::string_view name) const {
  const auto found = tensors_.find(absl::string_view(name.data(), name.size()));
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace epserve::runtime
