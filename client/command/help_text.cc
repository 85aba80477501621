#include "client/command/help_text.h"

namespace epserve::client {

void HideRanges(CLI::App* command) {
  for (CLI::Option* option : command->get_options()) {
    try {
      option->get_validator(0)->description("");
    } catch (const CLI::OptionNotFound&) {
      continue;  // It has no range.
    }
  }
}

}  // namespace epserve::client
