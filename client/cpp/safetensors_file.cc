#include "client/cpp/safetensors_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

// The format's own limit on the header.
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::uint64_t kLengthBytes = 8;

absl::Status Damaged(const std::string& path, const std::string& what) {
  return absl::DataLossError(
      absl::StrCat("safetensors: file '", path, "' ", what, "; get an undamaged copy"));
}

absl::Status ReadExactly(int fd, const std::string& path, std::uint64_t offset, std::size_t size,
                         char* destination) {
  while (size > 0) {
    const ssize_t got = pread(fd, destination, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError("read", path, errno);
    if (got == 0) return Damaged(path, absl::StrCat("ends at byte ", offset, ", inside a tensor"));
    offset += static_cast<std::uint64_t>(got);
    destination += got;
    size -= static_cast<std::size_t>(got);
  }
  return absl::OkStatus();
}

// Parses JSON and refuses a key given twice in one object, which a DOM would silently merge.
nlohmann::json ParseStrict(const std::string& text, std::string* repeated_key) {
  std::vector<std::set<std::string>> open_objects;
  const auto watch = [&](int, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    if (event == nlohmann::json::parse_event_t::object_start) {
      open_objects.emplace_back();
    } else if (event == nlohmann::json::parse_event_t::object_end) {
      open_objects.pop_back();
    } else if (event == nlohmann::json::parse_event_t::key) {
      const std::string& key = parsed.get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second) *repeated_key = key;
    }
    return true;
  };
  return nlohmann::json::parse(text, watch, /*allow_exceptions=*/false);
}

absl::StatusOr<TensorEntry> ParseEntry(const std::string& path, const std::string& name,
                                       const nlohmann::json& value, std::uint64_t data_bytes) {
  const auto bad = [&](const std::string& what) {
    return Damaged(path, absl::StrCat("tensor '", name, "' ", what));
  };
  if (!value.is_object()) return bad("is not described by an object");
  const auto dtype = value.find("dtype");
  const auto shape = value.find("shape");
  const auto offsets = value.find("data_offsets");
  if (dtype == value.end() || !dtype->is_string()) return bad("has no dtype");
  if (shape == value.end() || !shape->is_array()) return bad("has no shape");
  if (offsets == value.end() || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return bad("has no data_offsets [begin, end]");
  }
  TensorEntry entry;
  const auto type = FromSafetensorsName(dtype->get<std::string>());
  if (!type) return bad(absl::StrCat("has unknown dtype '", dtype->get<std::string>(), "'"));
  entry.type = *type;
  for (const nlohmann::json& size : *shape) {
    if (!size.is_number_unsigned() || size.get<std::uint64_t>() > INT64_MAX) {
      return bad("has a shape that is not of non-negative integers");
    }
    entry.shape.push_back(size.get<std::int64_t>());
  }
  entry.begin = (*offsets)[0].get<std::uint64_t>();
  entry.end = (*offsets)[1].get<std::uint64_t>();
  if (entry.begin > entry.end || entry.end > data_bytes) {
    return bad(absl::StrCat("spans bytes ", entry.begin, " to ", entry.end, ", outside the file's ",
                            data_bytes, " data bytes"));
  }
  const auto count = ElementCount(entry.shape);
  std::int64_t bytes = 0;
  if (!count ||
      __builtin_mul_overflow(*count, static_cast<std::int64_t>(ElementSize(entry.type)), &bytes) ||
      static_cast<std::uint64_t>(bytes) != entry.end - entry.begin) {
    return bad(absl::StrCat("has ", entry.end - entry.begin, " bytes, which shape ",
                            ShapeString(entry.shape), " of ", SafetensorsName(entry.type),
                            " does not fill"));
  }
  return entry;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  FileHandle handle(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (handle.get() < 0) return FileError("open", path, errno);
  struct stat info {};
  if (fstat(handle.get(), &info) != 0) return FileError("stat", path, errno);
  if (!S_ISREG(info.st_mode)) return Damaged(path, "is not a regular file");
  const auto file_bytes = static_cast<std::uint64_t>(info.st_size);
  if (file_bytes < kLengthBytes) {
    return Damaged(path,
                   absl::StrCat("has ", file_bytes, " bytes, less than the header's length takes"));
  }
  std::uint64_t header_bytes = 0;
  EPC_RETURN_IF_ERROR(
      ReadExactly(handle.get(), path, 0, kLengthBytes, reinterpret_cast<char*>(&header_bytes)));
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_bytes - kLengthBytes) {
    return Damaged(path, absl::StrCat("has a header of ", header_bytes, " bytes, which exceeds ",
                                      std::min(kMaxHeaderBytes, file_bytes - kLengthBytes)));
  }
  std::string header(header_bytes, '\0');
  EPC_RETURN_IF_ERROR(ReadExactly(handle.get(), path, kLengthBytes, header.size(), header.data()));
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile(path, std::move(handle)));
  file->data_begin_ = kLengthBytes + header_bytes;
  EPC_RETURN_IF_ERROR(file->ParseHeader(header, file_bytes - file->data_begin_));
  return file;
}

absl::Status SafetensorsFile::ParseHeader(const std::string& header, std::uint64_t data_bytes) {
  std::string repeated_key;
  const nlohmann::json root = ParseStrict(header, &repeated_key);
  if (!root.is_object()) return Damaged(path_, "has a header that is not a JSON object");
  if (!repeated_key.empty()) {
    return Damaged(path_, absl::StrCat("names '", repeated_key, "' twice in its header"));
  }
  std::vector<std::pair<std::uint64_t, std::string>> by_begin;
  for (const auto& item : root.items()) {
    if (item.key() == "__metadata__") continue;
    EPC_ASSIGN_OR_RETURN(TensorEntry entry,
                         ParseEntry(path_, item.key(), item.value(), data_bytes));
    by_begin.emplace_back(entry.begin, item.key());
    entries_.emplace(item.key(), std::move(entry));
  }
  // Empty tensors share their begin with a neighbour, so ranges are ordered by (begin, end).
  std::sort(by_begin.begin(), by_begin.end(), [&](const auto& a, const auto& b) {
    return std::make_pair(a.first, entries_.at(a.second).end) <
           std::make_pair(b.first, entries_.at(b.second).end);
  });
  std::uint64_t covered = 0;
  for (const auto& [begin, name] : by_begin) {
    if (begin != covered) {
      return Damaged(path_,
                     absl::StrCat("tensor '", name, "' begins at byte ", begin,
                                  begin < covered ? ", overlapping" : ", leaving a hole after",
                                  " the tensor that ends at ", covered));
    }
    covered = entries_.at(name).end;
  }
  if (covered != data_bytes) {
    return Damaged(path_, absl::StrCat("has ", data_bytes,
                                       " data bytes, of which its tensors cover ", covered));
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> SafetensorsFile::Read(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) {
    return absl::NotFoundError(
        absl::StrCat("safetensors: tensor '", name, "' is not in file '", path_, "'"));
  }
  Tensor tensor;
  tensor.type = found->second.type;
  tensor.shape = found->second.shape;
  TensorMemory memory(found->second.end - found->second.begin);
  EPC_RETURN_IF_ERROR(ReadExactly(file_.get(), path_, data_begin_ + found->second.begin,
                                  memory.size(), memory.data()));
  tensor.bytes = std::move(memory);
  return tensor;
}

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, const std::vector<TensorSpec>& specs) {
  nlohmann::ordered_json root = nlohmann::ordered_json::object();
  root["__metadata__"] = {{"format", "pt"}};
  // As a list: operator[] would look through all of it for each tensor.
  auto& described = root.get_ref<nlohmann::ordered_json::object_t&>();
  described.reserve(specs.size() + 1);
  std::vector<std::pair<std::string, std::uint64_t>> pending;
  std::set<std::string> names;
  std::uint64_t offset = 0;
  for (const TensorSpec& spec : specs) {
    const auto count = ElementCount(spec.shape);
    if (!count || spec.name.empty() || !names.insert(spec.name).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("safetensors: write '", path, "': tensor '", spec.name,
                       "' is given twice, has no name or a bad shape ", ShapeString(spec.shape)));
    }
    const std::uint64_t bytes = static_cast<std::uint64_t>(*count) * ElementSize(spec.type);
    described.emplace_back(spec.name,
                           nlohmann::ordered_json{{"dtype", SafetensorsName(spec.type)},
                                                  {"shape", spec.shape},
                                                  {"data_offsets", {offset, offset + bytes}}});
    pending.emplace_back(spec.name, bytes);
    offset += bytes;
  }
  std::string header = root.dump();
  // Readers expect the data 8-byte aligned; the format pads with spaces.
  header.append((8 - header.size() % 8) % 8, ' ');

  EPC_ASSIGN_OR_RETURN(auto file, OutputFile::Create(path));
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter(path, std::move(file)));
  writer->pending_ = std::move(pending);
  const std::uint64_t header_bytes = header.size();
  EPC_RETURN_IF_ERROR(
      writer->file_->Write(reinterpret_cast<const char*>(&header_bytes), kLengthBytes));
  EPC_RETURN_IF_ERROR(writer->file_->Write(header.data(), header.size()));
  return writer;
}

absl::Status SafetensorsWriter::Append(std::string_view bytes) {
  if (next_ >= pending_.size() || bytes.size() != pending_[next_].second) {
    return absl::InvalidArgumentError(absl::StrCat(
        "safetensors: write '", path_, "': got ", bytes.size(), " bytes for tensor ",
        next_ < pending_.size()
            ? absl::StrCat("'", pending_[next_].first, "' of ", pending_[next_].second, " bytes")
            : std::string("past the last")));
  }
  ++next_;
  return file_->Write(bytes.data(), bytes.size());
}

absl::Status SafetensorsWriter::Finish() {
  if (next_ != pending_.size()) {
    return absl::FailedPreconditionError(absl::StrCat("safetensors: write '", path_, "': only ",
                                                      next_, " of ", pending_.size(),
                                                      " tensors were appended"));
  }
  return file_->Finish();
}

absl::Status WriteSafetensors(const std::string& path,
                              const std::map<std::string, Tensor>& tensors) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back({name, tensor.type, tensor.shape});
  EPC_ASSIGN_OR_RETURN(auto writer, SafetensorsWriter::Create(path, specs));
  for (const auto& [name, tensor] : tensors) EPC_RETURN_IF_ERROR(writer->Append(tensor.bytes));
  return writer->Finish();
}

absl::StatusOr<std::map<std::string, Tensor>> ReadSafetensors(const std::string& path) {
  EPC_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(path));
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, entry] : file->entries()) {
    EPC_ASSIGN_OR_RETURN(Tensor tensor, file->Read(name));
    tensors.emplace(name, std::move(tensor));
  }
  return tensors;
}

}  // namespace epserve::client
