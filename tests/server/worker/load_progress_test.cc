#include "server/worker/load_progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace epserve::worker {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// What is logged of a load of 1000 bytes in steps of 5, each of which takes `step_us`.
std::vector<int> LoggedPercents(std::int64_t step_us) {
  std::string drawn;
  std::vector<int> logged;
  std::int64_t now_us = 7;
  {
    LoadProgressDisplay display(
        [&](const std::string& text) { drawn += text; }, false, [&] { return now_us; },
        [&](int percent, std::uint64_t, std::uint64_t) { logged.push_back(percent); });
    for (std::uint64_t loaded = 0; loaded <= 1000; loaded += 5, now_us += step_us) {
      display.Update(loaded, 1000);
    }
    display.Update(1000, 1000);
  }
  EXPECT_THAT(drawn, IsEmpty());
  return logged;
}

TEST(LoadProgressDisplayTest, ElsewhereThanOnATerminalALineASecondAndTheEndAreLogged) {
  EXPECT_THAT(LoggedPercents(25'000), ElementsAre(20, 40, 60, 80, 100));
}

TEST(LoadProgressDisplayTest, LoadOfAMillisecondLogsItsEndAlone) {
  EXPECT_THAT(LoggedPercents(5), ElementsAre(100));
}

TEST(LoadProgressDisplayTest, OnATerminalOneLineIsRewrittenTenTimesASecondAtMost) {
  std::string text;
  std::int64_t now_us = 0;
  {
    LoadProgressDisplay display(
        [&](const std::string& piece) { text += piece; }, true, [&] { return now_us; },
        [](int, std::uint64_t, std::uint64_t) { ADD_FAILURE() << "logged on a terminal"; });
    display.Update(0, 2000);
    now_us = 50'000;
    display.Update(500, 2000);  // Too soon.
    now_us = 1'000'000;
    display.Update(1000, 2000);
    display.Update(2000, 2000);  // The end is always shown.
  }
  EXPECT_THAT(text, HasSubstr("\rloading weights"));
  EXPECT_THAT(text, HasSubstr(" 50%  1000 B of 1.95 KiB  1000 B/s"));
  EXPECT_THAT(text, testing::Not(HasSubstr(" 25%")));
  EXPECT_THAT(text, HasSubstr("100%"));
  EXPECT_EQ(text.back(), '\n');
}

}  // namespace
}  // namespace epserve::worker
