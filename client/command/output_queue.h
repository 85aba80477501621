// Writes to a descriptor without ever waiting for whoever reads it: what does not fit waits here,
// up to a bound, and what comes on top is dropped and counted. So a supervisor goes on supervising
// behind a full pipe.
//
// Thread safety: none. Another process that writes to the same pipe may still fill it between the
// look and the write.
#ifndef EPSERVE_CLIENT_COMMAND_OUTPUT_QUEUE_H_
#define EPSERVE_CLIENT_COMMAND_OUTPUT_QUEUE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "absl/time/time.h"

namespace epserve::client {

class OutputQueue {
 public:
  // `dropped_note` says, once there is room again, that so many pieces were dropped.
  OutputQueue(int fd, std::function<std::string(std::int64_t)> dropped_note)
      : fd_(fd), dropped_note_(std::move(dropped_note)) {}

  // A piece is written whole or dropped whole.
  void Add(const std::string& text);
  // As much as goes without waiting.
  void Flush();
  // Waits for all of it, at most so long; the rest is given up.
  void Drain(absl::Duration patience);

  int fd() const { return fd_; }
  bool empty() const { return waiting_.empty(); }

 private:
  const int fd_;
  const std::function<std::string(std::int64_t)> dropped_note_;
  std::string waiting_;
  std::int64_t dropped_ = 0;  // pieces, not told of yet
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_OUTPUT_QUEUE_H_
