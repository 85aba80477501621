#include "server/worker/load_progress.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/worker/memory_report.h"

namespace epserve::worker {
namespace {

constexpr std::int64_t kRedrawUs = 100'000;
constexpr std::int64_t kLogUs = 1'000'000;
constexpr int kBarCells = 30;

int Percent(std::uint64_t loaded, std::uint64_t total) {
  if (total == 0) return 100;
  return static_cast<int>(100.0 * static_cast<double>(std::min(loaded, total)) /
                          static_cast<double>(total));
}

}  // namespace

LoadProgressDisplay::LoadProgressDisplay(Draw draw, bool is_terminal,
                                         std::function<std::int64_t()> now_us, LogLine log)
    : draw_(std::move(draw)),
      is_terminal_(is_terminal),
      now_us_(std::move(now_us)),
      log_(std::move(log)),
      start_us_(now_us_()),
      logged_us_(start_us_) {}

LoadProgressDisplay::~LoadProgressDisplay() {
  if (drawn_) draw_("\n");
}

void LoadProgressDisplay::Update(std::uint64_t loaded, std::uint64_t total) {
  const int percent = Percent(loaded, total);
  const std::int64_t now_us = now_us_();
  if (is_terminal_) {
    if (!drawn_ || percent == 100 || now_us - drawn_us_ >= kRedrawUs) {
      DrawLine(loaded, total, now_us);
    }
    return;
  }
  const bool ends = percent == 100 && logged_percent_ < 100;
  if (ends || (percent > logged_percent_ && now_us - logged_us_ >= kLogUs)) {
    logged_percent_ = percent;
    logged_us_ = now_us;
    log_(percent, loaded, total);
  }
}

void LoadProgressDisplay::DrawLine(std::uint64_t loaded, std::uint64_t total, std::int64_t now_us) {
  const int percent = Percent(loaded, total);
  const int filled = percent * kBarCells / 100;
  const double seconds = static_cast<double>(std::max<std::int64_t>(now_us - start_us_, 1)) * 1e-6;
  const auto per_second = static_cast<std::uint64_t>(static_cast<double>(loaded) / seconds);
  draw_(absl::StrFormat("\rloading weights [%s%s] %3d%%  %s of %s  %s/s\x1b[K",
                        std::string(filled, '#'), std::string(kBarCells - filled, '.'), percent,
                        FormatBytes(loaded), FormatBytes(total), FormatBytes(per_second)));
  drawn_ = true;
  drawn_us_ = now_us;
}

}  // namespace epserve::worker
