#include "runtime/base/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <span>
#include <string>

namespace epserve::runtime {
namespace {

std::span<const LogField> SpanOf(LogFields fields) { return {fields.begin(), fields.size()}; }

std::string Text(LogFields fields) {
  return FormatLogLine(LogFormat::kText, LogLevel::kInfo, "prog", "event", SpanOf(fields));
}

std::string Json(LogFields fields) {
  return FormatLogLine(LogFormat::kJson, LogLevel::kWarning, "prog", "event", SpanOf(fields));
}

TEST(LogLineTest, TextIsEventThenKeyValuePairs) {
  EXPECT_EQ(Text({{"worker", "w0"}, {"rank", 3}, {"ready", true}, {"ratio", 0.5}}),
            "INFO prog event worker=w0 rank=3 ready=true ratio=0.5");
}

TEST(LogLineTest, TextWithoutFieldsIsTheEventAlone) { EXPECT_EQ(Text({}), "INFO prog event"); }

TEST(LogLineTest, TextValuesThatWouldBreakTheLineAreQuoted) {
  EXPECT_EQ(Text({{"a", "two words"}}), "INFO prog event a=\"two words\"");
  EXPECT_EQ(Text({{"a", "line\nbreak"}}), "INFO prog event a=\"line\\nbreak\"");
  EXPECT_EQ(Text({{"a", "k=v"}}), "INFO prog event a=\"k=v\"");
  EXPECT_EQ(Text({{"a", "say \"x\""}}), "INFO prog event a=\"say \\\"x\\\"\"");
  EXPECT_EQ(Text({{"a", ""}}), "INFO prog event a=\"\"");
}

TEST(LogLineTest, JsonKeepsNumbersBareAndQuotesStrings) {
  EXPECT_EQ(Json({{"worker", "7"}, {"rank", 3}, {"ok", false}}),
            "\"level\":\"WARNING\",\"program\":\"prog\",\"event\":\"event\",\"worker\":\"7\","
            "\"rank\":3,\"ok\":false");
}

TEST(LogLineTest, JsonQuotesNumbersThatJsonDoesNotHave) {
  const std::string line = Json({{"a", std::numeric_limits<double>::infinity()},
                                 {"b", std::numeric_limits<double>::quiet_NaN()}});
  EXPECT_THAT(line, testing::HasSubstr("\"a\":\"inf\""));
  EXPECT_THAT(line, testing::HasSubstr("\"b\":\"nan\""));
}

TEST(LogLineTest, JsonSurvivesBytesThatAreNotUtf8) {
  const std::string line = Json({{"a", std::string("\xff\x00 x", 4)}});
  EXPECT_THAT(line, testing::HasSubstr("\"a\":\""));
  EXPECT_EQ(line.find('\0'), std::string::npos);
}

TEST(LogLineTest, StatusIsPrintedWithItsCode) {
  EXPECT_EQ(Text({{"status", absl::NotFoundError("gone")}}),
            "INFO prog event status=\"NOT_FOUND: gone\"");
}

TEST(InitLogTest, UnknownWordsAreRefusedNamingTheAccepted) {
  const absl::Status level = InitLog("prog", "loud", "text");
  EXPECT_EQ(level.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(level.message()), testing::HasSubstr("debug, info, warning or error"));
  const absl::Status format = InitLog("prog", "info", "xml");
  EXPECT_EQ(format.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(format.message()), testing::HasSubstr("text or json"));
}

// What is written meanwhile, also where the machine is too busy for a line to be written at once.
std::string WrittenBy(const std::function<void()>& log) {
  testing::internal::CaptureStderr();
  log();
  FlushLog();
  return testing::internal::GetCapturedStderr();
}

TEST(InitLogTest, LevelAndFormatShapeWhatIsWritten) {
  ASSERT_TRUE(InitLog("prog", "warning", "json").ok());
  const std::string written = WrittenBy([] {
    LogInfo("quiet");
    LogError("loud", {{"n", 1}});
  });
  EXPECT_THAT(written, testing::Not(testing::HasSubstr("quiet")));
  EXPECT_THAT(written, testing::StartsWith("{\"time\":\""));
  EXPECT_THAT(
      written,
      testing::EndsWith("\"level\":\"ERROR\",\"program\":\"prog\",\"event\":\"loud\",\"n\":1}\n"));
  ASSERT_TRUE(InitLog("prog", "info", "text").ok());
  EXPECT_THAT(WrittenBy([] {
                LogInfo("seen", {{"n", 2}});
              }),
              testing::EndsWith("Z INFO prog seen n=2\n"));
}

TEST(LogFailureTest, TextIsForPeopleAndJsonIsAnErrorWhateverIsLogged) {
  ASSERT_TRUE(InitLog("prog", "error", "text").ok());
  const absl::Status status = absl::NotFoundError("start: it is gone");
  EXPECT_EQ(WrittenBy([&] { LogFailure(status); }), "prog: start: it is gone\n");
  ASSERT_TRUE(InitLog("prog", "error", "json").ok());
  EXPECT_THAT(WrittenBy([&] { LogFailure(status); }),
              testing::HasSubstr("\"event\":\"failed\",\"error\":\"NOT_FOUND: start"));
  ASSERT_TRUE(InitLog("prog", "info", "text").ok());
}

TEST(LogTextTest, IsWrittenAsItIs) {
  EXPECT_EQ(WrittenBy([] { LogText("\r50 %"); }), "\r50 %");
}

}  // namespace
}  // namespace epserve::runtime
