// A file that is written as a whole or not at all: it appears under its name, in place of what was
// there, only when Finish succeeds. Links are followed, and what is no regular file (a device, a
// pipe) is written where it is. Belongs to one thread.
#ifndef EPSERVE_CLIENT_CPP_OUTPUT_FILE_H_
#define EPSERVE_CLIENT_CPP_OUTPUT_FILE_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/file_handle.h"

namespace epserve::client {

// `error` is an errno. RESOURCE_EXHAUSTED: no room. NOT_FOUND: no such directory. Else UNKNOWN.
absl::Status FileError(const std::string& verb, const std::string& path, int error);

class OutputFile {
 public:
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();  // Unfinished: what was there before stays.

  // Where the bytes go until Finish: beside the file, or into it where it is written in place.
  const std::string& written_path() const { return temporary_.empty() ? path_ : temporary_; }
  absl::Status Write(const char* data, std::size_t size);
  absl::Status Finish();

 private:
  OutputFile(std::string path, std::string temporary, FileHandle file);

  const std::string path_;  // links followed
  std::string temporary_;   // beside it; empty: written in place, or finished
  FileHandle file_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_OUTPUT_FILE_H_
