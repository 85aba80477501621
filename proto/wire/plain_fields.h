// Fields of a Protobuf message, read one after another as they stand on the wire: for messages that
// are plain, which each side knows for itself. Whoever meets another gives it to the library.
#ifndef EPSERVE_PROTO_WIRE_PLAIN_FIELDS_H_
#define EPSERVE_PROTO_WIRE_PLAIN_FIELDS_H_

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace epserve::wire {

// Tags of one byte: a field's number and how its value is written.
constexpr std::uint8_t VarintTag(int field) { return static_cast<std::uint8_t>(field << 3); }
constexpr std::uint8_t Fixed64Tag(int field) { return static_cast<std::uint8_t>(field << 3 | 1); }
constexpr std::uint8_t BytesTag(int field) { return static_cast<std::uint8_t>(field << 3 | 2); }

// A message's bytes, from its next field on. Once something was not plain, `failed` stays.
class PlainFields {
 public:
  explicit PlainFields(std::string_view bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}

  bool failed() const { return failed_; }
  bool done() const { return failed_ || at_ == end_; }
  void Fail() { failed_ = true; }

  std::uint8_t Tag() { return static_cast<std::uint8_t>(*at_++); }  // REQUIRES: !done()

  std::uint64_t Varint() {
    std::uint64_t number = 0;
    for (int shift = 0; shift < 64 && at_ != end_; shift += 7) {
      const auto byte = static_cast<std::uint8_t>(*at_++);
      if (shift == 63 && byte > 1) break;
      number |= std::uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return number;
    }
    return Fail(), 0;
  }

  double Fixed64AsDouble() {
    static_assert(std::endian::native == std::endian::little);
    double value = 0;
    if (end_ - at_ < static_cast<std::ptrdiff_t>(sizeof(value))) return Fail(), value;
    std::memcpy(&value, at_, sizeof(value));
    at_ += sizeof(value);
    return value;
  }

  std::string_view Bytes() {
    const char* const begin = at_;
    const std::uint64_t size = Varint();
    // The library takes lengths of five bytes at most; these are shorter, and plain.
    if (failed_ || at_ - begin > 4 || size > static_cast<std::uint64_t>(end_ - at_)) {
      return Fail(), std::string_view();
    }
    at_ += size;
    return {at_ - size, static_cast<std::size_t>(size)};
  }

  // The library looks for valid UTF-8, which ASCII is.
  std::string_view Text() {
    const std::string_view text = Bytes();
    const bool ascii = std::all_of(text.begin(), text.end(),
                                   [](char c) { return static_cast<unsigned char>(c) < 0x80; });
    if (!ascii) Fail();
    return text;
  }

 private:
  const char* at_;
  const char* const end_;
  bool failed_ = false;
};

}  // namespace epserve::wire

#endif  // EPSERVE_PROTO_WIRE_PLAIN_FIELDS_H_
