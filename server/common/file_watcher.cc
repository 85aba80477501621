#include "server/common/file_watcher.h"

#include <sys/stat.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "runtime/base/log.h"

namespace epserve::server {

absl::StatusOr<std::unique_ptr<FileWatcher>> FileWatcher::Start(std::vector<std::string> paths,
                                                                Load load,
                                                                std::chrono::milliseconds period) {
  std::erase(paths, std::string());
  std::unique_ptr<FileWatcher> watcher(new FileWatcher(std::move(paths), std::move(load), period));
  // Before the files are read: what changes in between is seen as a change.
  std::string stamp = watcher->Stamp();
  if (absl::Status loaded = watcher->load_(); !loaded.ok()) return loaded;
  watcher->thread_ =
      std::thread([raw = watcher.get(), stamp = std::move(stamp)] { raw->Watch(stamp); });
  return watcher;
}

FileWatcher::FileWatcher(std::vector<std::string> paths, Load load,
                         std::chrono::milliseconds period)
    : paths_(std::move(paths)), load_(std::move(load)), period_(period) {}

FileWatcher::~FileWatcher() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::string FileWatcher::Stamp() const {
  std::string stamp;
  for (const std::string& path : paths_) {
    struct stat info {};
    if (::stat(path.c_str(), &info) != 0) {
      absl::StrAppend(&stamp, "missing;");
      continue;
    }
    absl::StrAppend(&stamp, info.st_dev, ",", info.st_ino, ",", info.st_size, ",",
                    info.st_mtim.tv_sec, ".", info.st_mtim.tv_nsec, ";");
  }
  return stamp;
}

void FileWatcher::Watch(std::string loaded) {
  std::string refused;  // the last stamp whose files could not be taken in
  std::unique_lock lock(mutex_);
  while (!stop_changed_.wait_for(lock, period_, [this] { return stopping_; })) {
    lock.unlock();
    std::string stamp = Stamp();
    if (stamp != loaded) {
      const absl::Status status = load_();
      if (status.ok()) {
        runtime::LogInfo("files_reloaded", {{"files", absl::StrJoin(paths_, ",")}});
        loaded = std::move(stamp);
      } else if (stamp != refused) {  // Files that are being replaced one by one do not fit yet.
        runtime::LogWarning("files_not_reloaded",
                            {{"files", absl::StrJoin(paths_, ",")}, {"status", status}});
        refused = std::move(stamp);
      }
    }
    lock.lock();
  }
}

}  // namespace epserve::server
