// What CLI11 cannot know of this command's options: their environment variables, and how its help
// is to read.
#ifndef EPSERVE_CLIENT_COMMAND_OPTION_TEXTS_H_
#define EPSERVE_CLIENT_COMMAND_OPTION_TEXTS_H_

#include <CLI/CLI.hpp>

namespace epserve::client {

// "--max-batch-tokens" is EPSERVE_MAX_BATCH_TOKENS. Only the chosen subcommand's flags: CLI11 reads
// the environment of every subcommand, and a variable meant for one must not trip another.
void NameEnvironment(CLI::App* command);

// Ranges stand in the descriptions where they matter; CLI11's own text for them reads badly.
void HideRanges(CLI::App* command);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_OPTION_TEXTS_H_
