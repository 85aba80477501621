#include "server/common/command_line.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace epserve::server {

std::string UsageError(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
  if (unknown.empty()) return error.what();
  return absl::StrCat("not known: ", absl::StrJoin(unknown, " "));
}

void AddLogFlags(CLI::App& app, std::string& format, std::string& level) {
  app.add_option("--log-format", format, "Form of the log on stderr: text, json")
      ->envname("EPSERVE_LOG_FORMAT")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  app.add_option("--log-level", level, "Least level logged: debug, info, warning, error")
      ->envname("EPSERVE_LOG_LEVEL")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str();
}

absl::StatusOr<std::optional<std::string>> Parse(CLI::App& app, const std::string& program,
                                                 int argc, const char* const* argv) {
  const std::string version = absl::StrCat(program, " ", EPSERVE_VERSION);
  app.set_version_flag("--version", version);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    return app.help();
  } catch (const CLI::CallForVersion&) {
    return absl::StrCat(version, "\n");
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("options: ", UsageError(app, error), "; see ", program, " --help"));
  }
  return std::nullopt;
}

}  // namespace epserve::server
