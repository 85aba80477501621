#include "client/cpp/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

// A name that no other writer takes, of this process or another.
std::string TemporaryName(const std::string& path) {
  static std::atomic<int> next{0};
  return absl::StrCat(path, ".partial-", getpid(), "-", next.fetch_add(1));
}

}  // namespace

absl::Status FileError(const std::string& verb, const std::string& path, int error) {
  const std::string message = absl::StrCat(verb, " '", path, "': ", strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    return absl::ResourceExhaustedError(message + "; make room, or write elsewhere");
  }
  return error == ENOENT ? absl::NotFoundError(message) : absl::UnknownError(message);
}

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path) {
  std::error_code error;
  // Follows links as far as they lead, also one that leads to a file which is not there yet.
  const std::string target = std::filesystem::weakly_canonical(path, error).string();
  if (error) return FileError("create", path, error.value());
  struct stat info {};
  if (stat(target.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    FileHandle file(open(target.c_str(), O_WRONLY | O_CLOEXEC));
    if (file.get() < 0) return FileError("write", path, errno);
    return std::unique_ptr<OutputFile>(new OutputFile(target, "", std::move(file)));
  }
  std::string temporary = TemporaryName(target);
  FileHandle file(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.get() < 0) return FileError("create", path, errno);
  return std::unique_ptr<OutputFile>(new OutputFile(target, std::move(temporary), std::move(file)));
}

OutputFile::OutputFile(std::string path, std::string temporary, FileHandle file)
    : path_(std::move(path)), temporary_(std::move(temporary)), file_(std::move(file)) {}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

absl::Status OutputFile::Write(const char* data, std::size_t size) {
  while (size > 0) {
    const ssize_t put = write(file_.get(), data, size);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return FileError("write", path_, errno);
    data += put;
    size -= static_cast<std::size_t>(put);
  }
  return absl::OkStatus();
}

absl::Status OutputFile::Finish() {
  if (file_.Close() != 0) return FileError("close", path_, errno);
  if (temporary_.empty()) return absl::OkStatus();
  if (rename(temporary_.c_str(), path_.c_str()) != 0) return FileError("rename", path_, errno);
  temporary_.clear();
  return absl::OkStatus();
}

}  // namespace epserve::client
