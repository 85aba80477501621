// What the command lines of the coordinator and the worker have in common.
#ifndef EPSERVE_SERVER_COMMON_COMMAND_LINE_H_
#define EPSERVE_SERVER_COMMON_COMMAND_LINE_H_

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace epserve::server {

// What is wrong with the command line that `app` could not parse. A word that nobody knows comes
// before a flag that is missing: it may be that very flag, misspelt.
std::string UsageError(const CLI::App& app, const CLI::ParseError& error);

// Adds --log-format and --log-level, which default to what the strings hold.
void AddLogFlags(CLI::App& app, std::string& format, std::string& level);

// Parses the command line of `program`; CLI11's exceptions end here. Returns the text to print
// where it asks for --help or --version, which is added, and nothing where it is to be carried out.
// INVALID_ARGUMENT names the flag and what it accepts.
absl::StatusOr<std::optional<std::string>> Parse(CLI::App& app, const std::string& program,
                                                 int argc, const char* const* argv);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_COMMAND_LINE_H_
