// Structured logs: one event, then key=value pairs, or one JSON object a line. Thread-safe. A line
// is written when its call returns; where nobody reads stderr, calls return all the same, and the
// lines wait (see line_writer.h).
//
//   LogInfo("worker_joined", {{"worker", id}, {"rank", 3}});
//   2026-01-02T03:04:05.678Z INFO epserve-coordinator worker_joined worker=w0 rank=3
#ifndef EPSERVE_RUNTIME_BASE_LOG_H_
#define EPSERVE_RUNTIME_BASE_LOG_H_

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace epserve::runtime {

enum class LogLevel { kDebug, kInfo, kWarning, kError };
enum class LogFormat { kText, kJson };

// Sets up the process's log, which goes to stderr. Call once at start, before other threads.
// INVALID_ARGUMENT names the accepted words: level debug|info|warning|error, format text|json.
absl::Status InitLog(std::string_view program, std::string_view level, std::string_view format);

struct LogField {
  template <std::integral T>
  LogField(std::string_view k, T v)
      : key(k), value(std::is_same_v<T, bool> ? (v ? "true" : "false") : std::to_string(v)) {}
  LogField(std::string_view k, double v);
  LogField(std::string_view k, std::string_view v) : key(k), value(v), quoted(true) {}
  LogField(std::string_view k, const std::string& v) : key(k), value(v), quoted(true) {}
  LogField(std::string_view k, const char* v) : key(k), value(v), quoted(true) {}
  LogField(std::string_view k, const absl::Status& v) : key(k), value(v.ToString()), quoted(true) {}

  std::string_view key;
  std::string value;
  bool quoted = false;  // A string: quoted where it holds spaces or quotes, and always in JSON.
};

using LogFields = std::initializer_list<LogField>;

void Log(LogLevel level, std::string_view event, std::span<const LogField> fields);
inline void Log(LogLevel level, std::string_view event, LogFields fields) {
  Log(level, event, std::span<const LogField>(fields.begin(), fields.size()));
}
inline void LogDebug(std::string_view event, LogFields fields = {}) {
  Log(LogLevel::kDebug, event, fields);
}
inline void LogInfo(std::string_view event, LogFields fields = {}) {
  Log(LogLevel::kInfo, event, fields);
}
inline void LogWarning(std::string_view event, LogFields fields = {}) {
  Log(LogLevel::kWarning, event, fields);
}
inline void LogError(std::string_view event, LogFields fields = {}) {
  Log(LogLevel::kError, event, fields);
}

// Why the program ends, as its last line on stderr: for people as "<program>: <message>", in JSON
// an error of the event "failed", whatever level is logged. Call FlushLog before the end.
void LogFailure(const absl::Status& status);

// Writes `text` as it is, in turn with the lines of the log; for what a terminal shows.
void LogText(std::string text);

// Gives lines that wait for a reader a last second; they are lost with the process.
void FlushLog();

// The line that Log would write, without its time stamp; for tests.
std::string FormatLogLine(LogFormat format, LogLevel level, std::string_view program,
                          std::string_view event, std::span<const LogField> fields);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_LOG_H_
