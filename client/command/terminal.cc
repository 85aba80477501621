#include "client/command/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace epserve::client {

Terminal Terminal::Of(std::FILE* stream) {
  Terminal terminal;
  const int fd = fileno(stream);
  if (isatty(fd) == 0) return terminal;
  const char* type = std::getenv("TERM");
  const bool dumb = type == nullptr || std::string_view(type) == "dumb";
  terminal.interactive = !dumb;
  terminal.colored = !dumb && std::getenv("NO_COLOR") == nullptr;
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) terminal.columns = size.ws_col;
  return terminal;
}

std::string Terminal::Paint(Color color, const std::string& text) const {
  if (!colored || text.empty()) return text;
  const char* code = "";
  switch (color) {
    case Color::kPlain:
      return text;
    case Color::kBold:
      code = "1";
      break;
    case Color::kDim:
      code = "2";
      break;
    case Color::kGreen:
      code = "32";
      break;
    case Color::kYellow:
      code = "33";
      break;
    case Color::kRed:
      code = "31";
      break;
    case Color::kCyan:
      code = "36";
      break;
  }
  return std::string("\x1b[") + code + "m" + text + "\x1b[0m";
}

std::size_t DisplayWidth(const std::string& text) {
  std::size_t width = 0;
  for (const char c : text) width += (static_cast<unsigned char>(c) & 0xc0u) != 0x80u ? 1 : 0;
  return width;
}

}  // namespace epserve::client
