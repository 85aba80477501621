// Shows how far loading is: one line that rewrites itself on a terminal, elsewhere a log
// line a second at most, and one at the end. Used by one thread, the one that loads.
#ifndef EPSERVE_SERVER_WORKER_LOAD_PROGRESS_H_
#define EPSERVE_SERVER_WORKER_LOAD_PROGRESS_H_

#include <cstdint>
#include <functional>
#include <string>

namespace epserve::worker {

class LoadProgressDisplay {
 public:
  // `draw` shows the terminal's line; `log` is called with percent, loaded and total bytes.
  using Draw = std::function<void(std::string text)>;
  using LogLine = std::function<void(int percent, std::uint64_t loaded, std::uint64_t total)>;
  LoadProgressDisplay(Draw draw, bool is_terminal, std::function<std::int64_t()> now_us,
                      LogLine log);
  // Ends the terminal's line where one was begun.
  ~LoadProgressDisplay();
  LoadProgressDisplay(const LoadProgressDisplay&) = delete;
  LoadProgressDisplay& operator=(const LoadProgressDisplay&) = delete;

  void Update(std::uint64_t loaded, std::uint64_t total);

 private:
  void DrawLine(std::uint64_t loaded, std::uint64_t total, std::int64_t now_us);

  const Draw draw_;
  const bool is_terminal_;
  const std::function<std::int64_t()> now_us_;
  const LogLine log_;
  const std::int64_t start_us_;
  std::int64_t drawn_us_ = 0;
  bool drawn_ = false;
  std::int64_t logged_us_;
  int logged_percent_ = 0;
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_LOAD_PROGRESS_H_
