#include "runtime/base/line_writer.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "runtime/base/unique_fd.h"

namespace epserve::runtime {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

constexpr seconds kLong{20};

std::string Missing(std::int64_t num_lines) { return absl::StrCat("missing ", num_lines, "\n"); }

class LineWriterTest : public testing::Test {
 protected:
  LineWriterTest() {
    int ends[2];
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    reader_ = UniqueFd(ends[0]);
    writer_ = UniqueFd(ends[1]);
    EXPECT_GT(::fcntl(writer_.get(), F_SETPIPE_SZ, 4096), 0);
  }

  // Reads until the last line is `last`.
  std::vector<std::string> ReadUntil(const std::string& last) {
    std::string text;
    while (!text.ends_with(last)) {
      char piece[4096];
      const ssize_t got = ::read(reader_.get(), piece, sizeof(piece));
      if (got <= 0) break;
      text.append(piece, static_cast<std::size_t>(got));
    }
    return absl::StrSplit(text, '\n', absl::SkipEmpty());
  }

  UniqueFd reader_;
  UniqueFd writer_;
};

TEST_F(LineWriterTest, LineIsThereWhenTheCallReturns) {
  LineWriter lines(writer_.get(), Missing);
  ASSERT_EQ(::fcntl(reader_.get(), F_SETFL, O_NONBLOCK), 0);
  lines.Write("first\n");
  ASSERT_TRUE(lines.Flush(kLong));  // Where the machine was too busy for that.
  EXPECT_EQ(ReadUntil("first\n"), std::vector<std::string>{"first"});
}

TEST_F(LineWriterTest, NobodyWaitsForAReaderThatStopsAndNothingIsLostOfWhatFits) {
  LineWriter lines(writer_.get(), Missing);
  const auto began = Clock::now();
  constexpr int kLines = 2000;  // 20 ms each would be more than the test waits.
  std::vector<std::string> expected;
  for (int i = 0; i < kLines; ++i) {
    expected.push_back(absl::StrCat("line ", i));
    lines.Write(absl::StrCat(expected.back(), "\n"));
  }
  EXPECT_LT(Clock::now() - began, kLong);
  EXPECT_FALSE(lines.Flush(milliseconds(10)));
  EXPECT_EQ(ReadUntil(absl::StrCat("line ", kLines - 1, "\n")), expected);
  EXPECT_TRUE(lines.Flush(kLong));
}

TEST_F(LineWriterTest, AReaderThatHasStoppedIsWaitedForOnce) {
  LineWriter lines(writer_.get(), Missing);
  const std::string large(8000, 'x');  // More than the pipe takes.
  lines.Write(absl::StrCat(large, "\n"));
  auto shortest = Clock::duration::max();
  for (int i = 0; i < 3; ++i) {
    // Longer than nobody waits after one that has waited.
    std::this_thread::sleep_for(milliseconds(1100));
    const auto began = Clock::now();
    lines.Write("next\n");
    shortest = std::min(shortest, Clock::now() - began);
  }
  EXPECT_LT(shortest, milliseconds(50));
  EXPECT_EQ(ReadUntil("next\nnext\nnext\n").size(), 4U);
}

TEST_F(LineWriterTest, OldestLinesAreDroppedBeyondTheBoundAndTheirNumberIsTold) {
  LineWriter lines(writer_.get(), Missing);
  const std::string padding(1000, '.');
  constexpr int kLines = 3000;  // 3 MB, of which a third may wait.
  for (int i = 0; i < kLines; ++i) lines.Write(absl::StrCat(i, padding, "\n"));
  const std::vector<std::string> read = ReadUntil(absl::StrCat(kLines - 1, padding, "\n"));
  int expected = 0;
  int num_notes = 0;
  for (const std::string& line : read) {
    if (line.starts_with("missing ")) {
      expected += std::stoi(line.substr(8));
      ++num_notes;
    } else {
      EXPECT_EQ(line, absl::StrCat(expected, padding));
      ++expected;
    }
  }
  EXPECT_EQ(num_notes, 1);
  EXPECT_EQ(expected, kLines);
  EXPECT_GT(read.size(), 1000U);
  EXPECT_LT(read.size(), 1100U);
}

TEST_F(LineWriterTest, LinesOfOneThreadKeepTheirOrder) {
  LineWriter lines(writer_.get(), Missing);
  constexpr int kThreads = 4;
  constexpr int kLines = 200;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&lines, thread] {
      for (int i = 0; i < kLines; ++i) lines.Write(absl::StrCat(thread, " ", i, "\n"));
    });
  }
  std::vector<int> next(kThreads);
  for (int left = kThreads * kLines; left > 0;) {
    for (const std::string& line : ReadUntil("\n")) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      EXPECT_EQ(std::stoi(words.at(1)), next.at(std::stoi(words.at(0)))++);
      --left;
    }
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(LineWriterTest, DescriptorThatWouldBlockIsWaitedForAndOneThatFailsIsNot) {
  ASSERT_EQ(::fcntl(writer_.get(), F_SETFL, O_NONBLOCK), 0);
  LineWriter lines(writer_.get(), Missing);
  const std::string large(20'000, 'x');  // More than the pipe takes.
  lines.Write(absl::StrCat(large, "\n"));
  EXPECT_EQ(ReadUntil("\n"), std::vector<std::string>{large});
  LineWriter nowhere(-1, Missing);
  nowhere.Write("lost\n");
  EXPECT_TRUE(nowhere.Flush(kLong));
}

}  // namespace
}  // namespace epserve::runtime
