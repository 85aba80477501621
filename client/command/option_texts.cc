#include "client/command/option_texts.h"

#include <cctype>
#include <string>

namespace epserve::client {

void NameEnvironment(CLI::App* command) {
  for (CLI::Option* option : command->get_options()) {
    const std::string name = option->get_name(false, true);
    if (name.rfind("--", 0) != 0 || name.find(',') != std::string::npos) continue;
    std::string variable = "EPSERVE_";
    for (const char c : name.substr(2)) {
      variable += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    }
    option->envname(variable);
  }
}

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
