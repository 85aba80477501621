#include "runtime/checkpoint/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

absl::Status RefuseName(std::string_view name) {
  // The name may hold anything: what is printed is bounded and plain.
  std::string shown;
  for (const char c : name.substr(0, 128)) {
    shown += c >= ' ' && c <= '~' ? c : '?';
  }
  return absl::InvalidArgumentError(
      absl::StrCat("checkpoint: file name \"", shown,
                   "\" leaves the checkpoint directory; a plain name is "
                   "expected"));
}

// Only what is not there is NOT_FOUND: a checkpoint is looked for under another name then, and a
// file that is there must not be passed over.
absl::Status CannotOpen(const std::string& path, int error) {
  const std::string message =
      absl::StrCat("checkpoint: ", path, " cannot be opened: ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(absl::StrCat(
          message, "; make it, and the directories on the way, readable by uid ", ::geteuid()));
    case EMFILE:
      return absl::ResourceExhaustedError(
          absl::StrCat(message, "; raise this process's limit (ulimit -n)"));
    case ENFILE:
      return absl::ResourceExhaustedError(
          absl::StrCat(message, "; raise this machine's limit (sysctl fs.file-max)"));
    default:
      return absl::FailedPreconditionError(message);
  }
}

bool IsPlainName(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name.find('/') == std::string_view::npos && name.find('\0') == std::string_view::npos;
}

}  // namespace

absl::StatusOr<InputFile> InputFile::Open(const std::string& directory, std::string_view name) {
  if (!IsPlainName(name)) return RefuseName(name);
  const std::string file(name);
  UniqueFd dir(::open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!dir.valid()) return CannotOpen("directory " + directory, errno);
  // O_NONBLOCK: a FIFO in the place of the file must not hang the start.
  UniqueFd fd(::openat(dir.get(), file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return CannotOpen(absl::StrCat(directory, "/", file), errno);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint: ", directory, "/", file, " is not a regular file"));
  }
  return InputFile(file, std::move(fd), static_cast<std::uint64_t>(info.st_size));
}

absl::Status InputFile::ReadAt(std::uint64_t offset, void* out, std::size_t bytes) const {
  if (offset > size_ || bytes > size_ - offset) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", name_, ": bytes ", offset, " to ",
                                            offset + bytes, " lie past the file's end at ", size_));
  }
  auto* place = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_.get(), place, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      return absl::DataLossError(absl::StrCat("checkpoint: ", name_, ": read of ", bytes,
                                              " bytes at ", offset, ": ", std::strerror(errno)));
    }
    if (got == 0) {
      return absl::DataLossError(absl::StrCat("checkpoint: ", name_, ": ends at ", offset,
                                              ", short by ", bytes,
                                              " bytes; it was cut while open"));
    }
    place += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> InputFile::ReadAll(std::uint64_t max_bytes) const {
  if (size_ > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint: ", name_, ": ", size_, " bytes exceed the limit of ", max_bytes));
  }
  std::string text(size_, '\0');
  EPS_RETURN_IF_ERROR(ReadAt(0, text.data(), text.size()));
  return text;
}

}  // namespace epserve::runtime
