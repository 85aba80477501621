// What the output goes to: whether a person watches it, how wide it is, and whether it takes
// colours. Colours are off where NO_COLOR is set or TERM is "dumb".
#ifndef EPSERVE_CLIENT_COMMAND_TERMINAL_H_
#define EPSERVE_CLIENT_COMMAND_TERMINAL_H_

#include <cstdio>
#include <string>

namespace epserve::client {

enum class Color { kPlain, kBold, kDim, kGreen, kYellow, kRed, kCyan };

struct Terminal {
  bool interactive = false;
  bool colored = false;
  int columns = 100;

  // What is known of `stream`, asked now.
  static Terminal Of(std::FILE* stream);

  // `text` in `color`, or as it is where there are no colours.
  std::string Paint(Color color, const std::string& text) const;
};

// Columns that `text` (UTF-8, no control characters) takes on a terminal.
std::size_t DisplayWidth(const std::string& text);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_TERMINAL_H_
