// A progress bar on stderr. On a terminal one line redrawn in place; elsewhere a plain line now and
// then, so that a log of it stays short. Not synchronised: one thread draws.
#ifndef EPSERVE_CLIENT_COMMAND_PROGRESS_H_
#define EPSERVE_CLIENT_COMMAND_PROGRESS_H_

#include <functional>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/command/terminal.h"

namespace epserve::client {

class Progress {
 public:
  // `write` takes what is to be shown in place of stderr.
  explicit Progress(std::string label, std::function<void(const std::string&)> write = ToStderr);
  // Takes an unfinished bar off the screen.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `fraction` is shown within [0, 1]. Cheap enough to call at every step: draws at most 20 times a
  // second.
  void Update(double fraction, const std::string& detail);
  // Takes the bar off the screen, so that other lines may be printed; Update draws it again.
  void Hide();

 private:
  static void ToStderr(const std::string& text);

  const std::string label_;
  const std::function<void(const std::string&)> write_;
  const Terminal terminal_;
  const absl::Time started_ = absl::Now();
  absl::Time last_drawn_ = absl::InfinitePast();
  bool visible_ = false;
};

// The bar alone: `width` columns, filled by `fraction`.
std::string Bar(double fraction, int width);

// " 42 %": `fraction` within [0, 1].
std::string Percent(double fraction);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_PROGRESS_H_
