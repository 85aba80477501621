// Names that came from a client, as error messages and logs show them.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_QUOTE_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_QUOTE_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace epserve::coordinator {

// In quotes, with whatever is not printable ASCII escaped, cut after 64 bytes.
inline std::string Quoted(std::string_view name) {
  constexpr std::size_t kMaxBytes = 64;
  const std::string shown(name.substr(0, kMaxBytes));
  return absl::StrCat("'", absl::CHexEscape(shown), name.size() > kMaxBytes ? "...'" : "'");
}

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_QUOTE_H_
