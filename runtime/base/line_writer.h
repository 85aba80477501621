// Writes lines to a descriptor whose reader may stop reading: a pipe to a pager, a terminal after
// Ctrl-S. A thread of its own writes; who has a line waits until it is written, so that a process
// that ends says all it had to, but only for a moment, and then for none of the next lines until
// the reader has caught up. They wait here up to a bound; beyond it the oldest are dropped and
// counted.
//
// Thread-safe; the lines of one thread keep their order. Of no use in a child made by fork, which
// the thread is not in.
#ifndef EPSERVE_RUNTIME_BASE_LINE_WRITER_H_
#define EPSERVE_RUNTIME_BASE_LINE_WRITER_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace epserve::runtime {

class LineWriter {
 public:
  // `dropped_note` gives the line that stands where so many are missing; called on the thread.
  using DroppedNote = std::function<std::string(std::int64_t num_lines)>;
  LineWriter(int fd, DroppedNote dropped_note);
  // Waits for the write that is under way; the lines behind it are given up.
  ~LineWriter();
  LineWriter(const LineWriter&) = delete;
  LineWriter& operator=(const LineWriter&) = delete;

  // `line` ends in a newline of its own where it is to.
  void Write(std::string line);

  // Waits until all is written, at most so long; returns whether it is.
  bool Flush(std::chrono::milliseconds patience);

 private:
  using TimePoint = std::chrono::steady_clock::time_point;

  struct Line {
    std::uint64_t number;
    std::string text;
  };

  void Run();

  const int fd_;
  const DroppedNote dropped_note_;

  std::mutex mutex_;
  std::condition_variable has_work_;
  std::condition_variable progressed_;
  // Guarded by mutex_, all of these.
  std::deque<Line> waiting_;
  std::size_t waiting_bytes_ = 0;
  std::int64_t num_dropped_ = 0;    // not told of yet
  std::uint64_t last_taken_ = 0;    // number of a line
  std::uint64_t last_written_ = 0;  // likewise
  bool writing_ = false;
  bool stopping_ = false;
  bool reader_is_late_ = false;  // since a wait in vain, until all is written; nobody waits
  TimePoint waits_again_at_;     // Nobody waits before.

  std::thread thread_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_LINE_WRITER_H_
