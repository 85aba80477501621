// A move-only file descriptor.
#ifndef EPSERVE_CLIENT_CPP_FILE_HANDLE_H_
#define EPSERVE_CLIENT_CPP_FILE_HANDLE_H_

#include <unistd.h>

#include <utility>

namespace epserve::client {

class FileHandle {
 public:
  explicit FileHandle(int fd = -1) : fd_(fd) {}
  FileHandle(FileHandle&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileHandle& operator=(FileHandle&& other) noexcept {
    if (this != &other) {
      Close();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~FileHandle() { Close(); }
  int get() const { return fd_; }
  // Closes now and returns what close() said.
  int Close() {
    const int fd = std::exchange(fd_, -1);
    return fd < 0 ? 0 : close(fd);
  }

 private:
  int fd_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_FILE_HANDLE_H_
