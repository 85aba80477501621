#include "client/command/progress.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"

namespace epserve::client {

namespace {

constexpr absl::Duration kRedrawInterval = absl::Milliseconds(50);
constexpr absl::Duration kPlainInterval = absl::Seconds(5);
constexpr int kBarColumns = 28;

}  // namespace

std::string Bar(double fraction, int width) {
  // Eighths of a column make a short bar move smoothly.
  constexpr const char* kPartial[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = static_cast<int>(std::lround(std::clamp(fraction, 0.0, 1.0) * width * 8));
  std::string bar;
  for (int i = 0; i < eighths / 8; ++i) bar += "█";
  bar += kPartial[eighths % 8];
  for (int i = (eighths + 7) / 8; i < width; ++i) bar += "░";
  return bar;
}

Progress::Progress(std::string label, std::function<void(const std::string&)> write)
    : label_(std::move(label)), write_(std::move(write)), terminal_(Terminal::Of(stderr)) {}

void Progress::ToStderr(const std::string& text) {
  std::fputs(text.c_str(), stderr);
  std::fflush(stderr);
}

Progress::~Progress() { Hide(); }

std::string Percent(double fraction) {
  return absl::StrFormat("%3.0f %%", 100 * std::clamp(fraction, 0.0, 1.0));
}

void Progress::Update(double fraction, const std::string& detail) {
  const absl::Time now = absl::Now();
  if (!terminal_.interactive) {
    // The first line only after a while: what is quick needs none.
    const absl::Time since = std::max(last_drawn_, started_);
    if (now - since < kPlainInterval) return;
    last_drawn_ = now;
    write_(absl::StrFormat("%s: %s  %s\n", label_, Percent(fraction), detail));
    return;
  }
  if (now - last_drawn_ < kRedrawInterval) return;
  last_drawn_ = now;
  const std::string percent = Percent(fraction);
  const std::size_t used = DisplayWidth(label_) + kBarColumns + percent.size() + 6;
  std::string shown = detail;
  // A line that wraps could not be redrawn in place. Details are ASCII.
  const std::size_t room =
      terminal_.columns > static_cast<int>(used) ? terminal_.columns - used - 1 : 0;
  if (shown.size() > room) shown.resize(room);
  write_(absl::StrFormat("\r\x1b[K%s  %s  %s  %s", label_,
                         terminal_.Paint(Color::kCyan, Bar(fraction, kBarColumns)), percent,
                         shown));
  visible_ = true;
}

void Progress::Hide() {
  if (!visible_) return;
  write_("\r\x1b[K");
  visible_ = false;
  last_drawn_ = absl::InfinitePast();
}

}  // namespace epserve::client
