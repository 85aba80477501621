// A file of a checkpoint directory, read by pread: what is not asked for never becomes resident.
// Thread-safe once open.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_INPUT_FILE_H_
#define EPSERVE_RUNTIME_CHECKPOINT_INPUT_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/unique_fd.h"

namespace epserve::runtime {

class InputFile {
 public:
  // Opens `directory`/`name`. NOT_FOUND: there is no such file. INVALID_ARGUMENT: the name is not a
  // plain file name, or the file is not a regular one. It is there and cannot be opened:
  // PERMISSION_DENIED, RESOURCE_EXHAUSTED (no file descriptors left), else FAILED_PRECONDITION.
  // Symbolic links are followed wherever they lead: the hub's download cache is made of links out
  // of the snapshot's directory.
  static absl::StatusOr<InputFile> Open(const std::string& directory, std::string_view name);

  const std::string& name() const { return name_; }
  std::uint64_t size() const { return size_; }

  // Reads exactly `bytes` from `offset`. DATA_LOSS: the file ends before that, or cannot be read.
  absl::Status ReadAt(std::uint64_t offset, void* out, std::size_t bytes) const;

  // The whole file as text. INVALID_ARGUMENT: it is larger than `max_bytes`.
  absl::StatusOr<std::string> ReadAll(std::uint64_t max_bytes) const;

 private:
  InputFile(std::string name, UniqueFd fd, std::uint64_t size)
      : name_(std::move(name)), fd_(std::move(fd)), size_(size) {}

  std::string name_;
  UniqueFd fd_;
  std::uint64_t size_ = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_INPUT_FILE_H_
