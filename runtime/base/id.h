// What a cluster and a worker may be called, [A-Za-z0-9_.-]{1,64}: names of segments and sockets
// are made from ids, and they go into logs and metrics as they are.
#ifndef EPSERVE_RUNTIME_BASE_ID_H_
#define EPSERVE_RUNTIME_BASE_ID_H_

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace epserve::runtime {

inline constexpr std::size_t kMaxIdBytes = 64;

constexpr bool IsIdChar(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
         c == '.' || c == '-';
}

constexpr bool IsId(std::string_view text) {
  return !text.empty() && text.size() <= kMaxIdBytes &&
         std::all_of(text.begin(), text.end(), IsIdChar);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_ID_H_
