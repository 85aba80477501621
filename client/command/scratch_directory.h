// Where the children of `epserve up` write their ports.
#ifndef EPSERVE_CLIENT_COMMAND_SCRATCH_DIRECTORY_H_
#define EPSERVE_CLIENT_COMMAND_SCRATCH_DIRECTORY_H_

#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace epserve::client {

// A directory that goes when this does.
class ScratchDirectory {
 public:
  static absl::StatusOr<std::unique_ptr<ScratchDirectory>> Create() {
    const char* const tmpdir = std::getenv("TMPDIR");
    const std::string parent = tmpdir != nullptr && *tmpdir != '\0' ? tmpdir : "/tmp";
    std::string path = parent + "/epserve-up-XXXXXX";
    if (mkdtemp(path.data()) == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("scratch directory in '", parent, "': ", strerror(errno),
                       "; set TMPDIR to a directory that exists and can be written"));
    }
    return std::unique_ptr<ScratchDirectory>(new ScratchDirectory(path));
  }
  ~ScratchDirectory() {
    for (const char* name : {"/port", "/metrics_port"}) unlink((path_ + name).c_str());
    rmdir(path_.c_str());
  }
  std::string File(const std::string& name) const { return path_ + "/" + name; }

 private:
  explicit ScratchDirectory(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_SCRATCH_DIRECTORY_H_
