// Reads files again when they change, so that renewed certificates and secrets take effect without
// a restart. Looks at what stat() says, so it sees files that are replaced, and links that lead
// elsewhere, as Kubernetes swaps them. Thread-safe.
#ifndef EPSERVE_SERVER_COMMON_FILE_WATCHER_H_
#define EPSERVE_SERVER_COMMON_FILE_WATCHER_H_

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::server {

class FileWatcher {
 public:
  // Takes the files in. Called in Start(), and from the watcher's thread when one of them has
  // changed; where it fails, what was taken in before stays in use, and it is called again later.
  using Load = std::function<absl::Status()>;

  // The first Load's error where it fails. Empty paths are left out.
  static absl::StatusOr<std::unique_ptr<FileWatcher>> Start(
      std::vector<std::string> paths, Load load,
      std::chrono::milliseconds period = std::chrono::seconds(1));
  ~FileWatcher();  // `load` does not run after it.
  FileWatcher(const FileWatcher&) = delete;
  FileWatcher& operator=(const FileWatcher&) = delete;

 private:
  FileWatcher(std::vector<std::string> paths, Load load, std::chrono::milliseconds period);
  std::string Stamp() const;
  void Watch(std::string loaded);

  const std::vector<std::string> paths_;
  const Load load_;
  const std::chrono::milliseconds period_;

  std::mutex mutex_;
  std::condition_variable stop_changed_;
  bool stopping_ = false;  // Guarded by mutex_.
  std::thread thread_;
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_FILE_WATCHER_H_
