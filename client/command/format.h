// Numbers and names for people: "1.23 ms", "96.0 MiB", "12,345". Pure functions.
#ifndef EPSERVE_CLIENT_COMMAND_FORMAT_H_
#define EPSERVE_CLIENT_COMMAND_FORMAT_H_

#include <cstdint>
#include <string>

namespace epserve::client {

// Three significant digits with the unit that suits: us, ms, s.
std::string FormatMicroseconds(double us);
// "1.5 s", "2 min 03 s", "4 h 05 min".
std::string FormatSeconds(double seconds);
// Binary units: "512 B", "96.0 MiB".
std::string FormatBytes(std::uint64_t bytes);
// Thousands apart: "1,234,567".
std::string FormatCount(std::uint64_t count);
// "1.2e-07".
std::string FormatError(double error);
// `text` with every control character and every byte that is not UTF-8 as "\\x1b": what another
// machine sent must not steer the terminal that shows it.
std::string Printable(const std::string& text);

// One line of a log in JSON, as the service's programs write theirs, of the event "up".
std::string JsonLogLine(const std::string& level, const std::string& message);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_FORMAT_H_
