#include "runtime/base/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/sink.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/line_writer.h"

namespace epserve::runtime {
namespace {

constexpr std::chrono::seconds kFlushPatience{1};

std::string LinesDropped(std::int64_t num_lines);

// Messages are whole lines already.
class WriterSink final : public spdlog::sinks::sink {
 public:
  explicit WriterSink(LineWriter* writer) : writer_(writer) {}
  void log(const spdlog::details::log_msg& message) override {
    writer_->Write(std::string(message.payload.data(), message.payload.size()));
  }
  void flush() override {}
  void set_pattern(const std::string&) override {}
  void set_formatter(std::unique_ptr<spdlog::formatter>) override {}

 private:
  LineWriter* const writer_;
};

struct LogState {
  std::string program = "epserve";
  LogFormat format = LogFormat::kText;
  LineWriter writer{STDERR_FILENO, LinesDropped};
  spdlog::logger logger{"epserve", std::make_shared<WriterSink>(&writer)};
};

LogState& State() {
  static LogState* state = new LogState;  // Never destroyed: threads may log until exit.
  return *state;
}

std::string_view LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "DEBUG";
    case LogLevel::kInfo:
      return "INFO";
    case LogLevel::kWarning:
      return "WARNING";
    case LogLevel::kError:
      return "ERROR";
  }
  return "INFO";
}

spdlog::level::level_enum SpdlogLevel(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

// RFC 3339 in UTC with milliseconds.
std::string TimeStamp() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto millis =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm parts{};
  gmtime_r(&seconds, &parts);
  char text[40];
  const std::size_t length = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &parts);
  std::snprintf(text + length, sizeof(text) - length, ".%03dZ", static_cast<int>(millis));
  return text;
}

std::string JsonString(std::string_view text) {
  // Bytes that are not UTF-8 (a file name, say) are replaced, so that a line is always valid JSON.
  return nlohmann::json(std::string(text))
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string TextValue(const LogField& field) {
  if (!field.quoted) return field.value;
  const bool plain =
      !field.value.empty() && field.value.find_first_of(" \t\n\r\"=\\") == std::string::npos;
  return plain ? field.value : JsonString(field.value);
}

std::string StampedLine(LogLevel level, std::string_view event, std::span<const LogField> fields) {
  const LogState& state = State();
  const std::string body = FormatLogLine(state.format, level, state.program, event, fields);
  return state.format == LogFormat::kText
             ? absl::StrCat(TimeStamp(), " ", body, "\n")
             : absl::StrCat("{\"time\":\"", TimeStamp(), "\",", body, "}\n");
}

std::string LinesDropped(std::int64_t num_lines) {
  const LogFields fields = {{"lines", num_lines}, {"cause", "nobody read the log"}};
  return StampedLine(LogLevel::kWarning, "log_lines_dropped", {fields.begin(), fields.size()});
}

}  // namespace

LogField::LogField(std::string_view k, double v) : key(k), value(absl::StrCat(v)) {
  quoted = value.find_first_not_of("0123456789+-.eE") != std::string::npos;  // "inf", "nan".
}

absl::Status InitLog(std::string_view program, std::string_view level, std::string_view format) {
  LogState& state = State();
  if (format != "text" && format != "json") {
    return absl::InvalidArgumentError(
        absl::StrCat("log: format \"", std::string(format), "\" is unknown; use text or json"));
  }
  spdlog::level::level_enum threshold;
  if (level == "debug") {
    threshold = spdlog::level::debug;
  } else if (level == "info") {
    threshold = spdlog::level::info;
  } else if (level == "warning") {
    threshold = spdlog::level::warn;
  } else if (level == "error") {
    threshold = spdlog::level::err;
  } else {
    return absl::InvalidArgumentError(absl::StrCat("log: level \"", std::string(level),
                                                   "\" is unknown; use debug, info, warning or "
                                                   "error"));
  }
  state.program = std::string(program);
  state.format = format == "json" ? LogFormat::kJson : LogFormat::kText;
  state.logger.set_level(threshold);
  return absl::OkStatus();
}

std::string FormatLogLine(LogFormat format, LogLevel level, std::string_view program,
                          std::string_view event, std::span<const LogField> fields) {
  std::string line;
  if (format == LogFormat::kText) {
    line = absl::StrCat(std::string(LevelName(level)), " ", std::string(program), " ",
                        std::string(event));
    for (const LogField& field : fields) {
      absl::StrAppend(&line, " ", std::string(field.key), "=", TextValue(field));
    }
    return line;
  }
  line = absl::StrCat("\"level\":", JsonString(LevelName(level)),
                      ",\"program\":", JsonString(program), ",\"event\":", JsonString(event));
  for (const LogField& field : fields) {
    absl::StrAppend(&line, ",", JsonString(field.key), ":",
                    field.quoted ? JsonString(field.value) : field.value);
  }
  return line;
}

void LogFailure(const absl::Status& status) {
  const LogState& state = State();
  if (state.format == LogFormat::kJson) return LogError("failed", {{"error", status}});
  LogText(absl::StrCat(state.program, ": ", status.message(), "\n"));
}

void LogText(std::string text) { State().writer.Write(std::move(text)); }

void FlushLog() { State().writer.Flush(kFlushPatience); }

void Log(LogLevel level, std::string_view event, std::span<const LogField> fields) {
  LogState& state = State();
  const spdlog::level::level_enum spdlog_level = SpdlogLevel(level);
  if (!state.logger.should_log(spdlog_level)) return;
  state.logger.log(spdlog_level, StampedLine(level, event, fields));
}

}  // namespace epserve::runtime
