// How the help of this command's options is to read, where CLI11 would have it otherwise.
#ifndef EPSERVE_CLIENT_COMMAND_HELP_TEXT_H_
#define EPSERVE_CLIENT_COMMAND_HELP_TEXT_H_

#include <CLI/CLI.hpp>

namespace epserve::client {

// Ranges stand in the descriptions where they matter; CLI11's own text for them reads badly.
void HideRanges(CLI::App* command);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_HELP_TEXT_H_
