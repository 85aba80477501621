// Reading and writing safetensors files: an 8-byte little-endian header length, a JSON header that
// gives each tensor's type, shape and byte range, and the bytes. Apart from the runtime's reader on
// purpose: what verifies the service does not share its code.
//
// Reading is strict, because files come from anywhere: a header that is longer than the file or
// than 100 MB, an unknown type, a negative or overflowing shape, a range that is out of bounds,
// overlaps another, leaves a hole or does not fit the shape, and a name given twice are DATA_LOSS
// naming file and tensor. Bytes are read on demand, never the whole file.
//
// Thread safety: SafetensorsFile is immutable after Open and may be read from several threads.
// SafetensorsWriter belongs to one thread.
#ifndef EPSERVE_CLIENT_CPP_SAFETENSORS_FILE_H_
#define EPSERVE_CLIENT_CPP_SAFETENSORS_FILE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/file_handle.h"
#include "client/cpp/output_file.h"
#include "client/cpp/tensor.h"

namespace epserve::client {

// A tensor's place, without its bytes.
struct TensorEntry {
  ElementType type = ElementType::kF32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // Bytes from the end of the header.
  std::uint64_t end = 0;
};

class SafetensorsFile {
 public:
  // NOT_FOUND: no such file. DATA_LOSS: damaged.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, TensorEntry>& entries() const { return entries_; }
  // NOT_FOUND: no tensor of that name. DATA_LOSS: the file has shrunk since Open.
  absl::StatusOr<Tensor> Read(const std::string& name) const;

 private:
  SafetensorsFile(std::string path, FileHandle file)
      : path_(std::move(path)), file_(std::move(file)) {}
  absl::Status ParseHeader(const std::string& header, std::uint64_t data_bytes);

  std::string path_;
  FileHandle file_;
  std::uint64_t data_begin_ = 0;
  std::map<std::string, TensorEntry> entries_;
};

struct TensorSpec {
  std::string name;
  ElementType type = ElementType::kF32;
  std::vector<std::int64_t> shape;
};

// Writes a file tensor by tensor, for files larger than memory. The file appears under its name
// only when Finish succeeds (OutputFile).
class SafetensorsWriter {
 public:
  // INVALID_ARGUMENT: a name given twice or a bad shape.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, const std::vector<TensorSpec>& specs);
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Where the bytes go until Finish: a name of its own beside `path`, or `path` itself.
  const std::string& written_path() const { return file_->written_path(); }
  // The next tensor's bytes, in the order of `specs`. INVALID_ARGUMENT: not the size its spec says.
  absl::Status Append(std::string_view bytes);
  // FAILED_PRECONDITION: some tensors were not appended.
  absl::Status Finish();

 private:
  SafetensorsWriter(std::string path, std::unique_ptr<OutputFile> file)
      : path_(std::move(path)), file_(std::move(file)) {}

  const std::string path_;
  const std::unique_ptr<OutputFile> file_;
  std::vector<std::pair<std::string, std::uint64_t>> pending_;  // name and bytes, by order
  std::size_t next_ = 0;
};

// Whole files at once.
absl::Status WriteSafetensors(const std::string& path,
                              const std::map<std::string, Tensor>& tensors);
absl::StatusOr<std::map<std::string, Tensor>> ReadSafetensors(const std::string& path);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_SAFETENSORS_FILE_H_
