// Fields of a Protobuf message, written one after another as they go over the wire: for replies,
// whose parameters the library would put into a hash map each time. Field numbers up to 15.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_WIRE_TEXT_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_WIRE_TEXT_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace epserve::coordinator {

inline std::size_t VarintBytes(std::uint64_t number) {
  return (static_cast<std::size_t>(std::bit_width(number | 1)) + 6) / 7;
}

inline constexpr std::size_t kMaxVarintBytes = 10;

// Writes to `to`, which has place for kMaxVarintBytes; gives the end.
inline char* PutVarint(std::uint64_t number, char* to) {
  for (; number >= 0x80; number >>= 7) *to++ = static_cast<char>(number | 0x80);
  *to++ = static_cast<char>(number);
  return to;
}

inline void AppendVarint(std::uint64_t number, std::string& text) {
  char bytes[kMaxVarintBytes];
  text.append(bytes, PutVarint(number, bytes));
}

inline void AppendIntField(int field, std::int64_t value, std::string& text) {
  char bytes[1 + kMaxVarintBytes];
  bytes[0] = static_cast<char>(field << 3);
  text.append(bytes, PutVarint(static_cast<std::uint64_t>(value), bytes + 1));
}

// Of a field of `bytes` bytes, which are to follow: a string, or a message.
inline void AppendFieldHead(int field, std::uint64_t bytes, std::string& text) {
  char head[1 + kMaxVarintBytes];
  head[0] = static_cast<char>(field << 3 | 2);
  text.append(head, PutVarint(bytes, head + 1));
}
inline std::size_t FieldHeadBytes(std::uint64_t bytes) { return 1 + VarintBytes(bytes); }

inline void AppendBytesField(int field, std::string_view bytes, std::string& text) {
  AppendFieldHead(field, bytes.size(), text);
  text += bytes;
}

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_WIRE_TEXT_H_
