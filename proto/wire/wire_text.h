// Fields of a Protobuf message, written one after another as they go over the wire: for requests,
// whose messages the library would build from some twenty small allocations each time, and for
// replies, whose parameters it would put into a hash map. Field numbers up to 15.
#ifndef EPSERVE_PROTO_WIRE_WIRE_TEXT_H_
#define EPSERVE_PROTO_WIRE_WIRE_TEXT_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace epserve::wire {

inline std::size_t VarintBytes(std::uint64_t number) {
  return (static_cast<std::size_t>(std::bit_width(number | 1)) + 6) / 7;
}

inline void AppendVarint(std::uint64_t number, std::string& text) {
  for (; number >= 0x80; number >>= 7) text.push_back(static_cast<char>(number | 0x80));
  text.push_back(static_cast<char>(number));
}

inline void AppendIntField(int field, std::int64_t value, std::string& text) {
  text.push_back(static_cast<char>(field << 3));
  AppendVarint(static_cast<std::uint64_t>(value), text);
}

// Of a field of `bytes` bytes, which are to follow: a string, or a message.
inline void AppendFieldHead(int field, std::uint64_t bytes, std::string& text) {
  text.push_back(static_cast<char>(field << 3 | 2));
  AppendVarint(bytes, text);
}
inline std::size_t FieldHeadBytes(std::uint64_t bytes) { return 1 + VarintBytes(bytes); }

inline void AppendBytesField(int field, std::string_view bytes, std::string& text) {
  AppendFieldHead(field, bytes.size(), text);
  text += bytes;
}

}  // namespace epserve::wire

#endif  // EPSERVE_PROTO_WIRE_WIRE_TEXT_H_
