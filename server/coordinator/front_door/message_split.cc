#include "server/coordinator/front_door/message_split.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

namespace epserve::coordinator {
namespace {

// The tag of ModelInferRequest.raw_input_contents: field 7, length-delimited.
constexpr std::uint64_t kRawTag = 7 << 3 | 2;
// The parser takes no longer tag or length.
constexpr int kMaxNumberBytes = 5;

// A place in the slices.
class Cursor {
 public:
  explicit Cursor(std::span<const grpc::Slice> slices) : slices_(slices) {
    for (const grpc::Slice& slice : slices) left_ += slice.size();
  }

  std::size_t left() const { return left_; }

  // REQUIRES: count <= left().
  template <typename Use>
  void Take(std::size_t count, const Use& use) {
    left_ -= count;
    while (count > 0) {
      const grpc::Slice& slice = slices_[index_];
      const std::size_t here = std::min(count, slice.size() - offset_);
      if (here > 0) {
        use(std::span<const char>(reinterpret_cast<const char*>(slice.begin()) + offset_, here));
      }
      count -= here;
      offset_ += here;
      if (offset_ == slice.size()) {
        ++index_;
        offset_ = 0;
      }
    }
  }

  void AppendTo(std::string& text, std::size_t count) {
    Take(count, [&text](std::span<const char> piece) { text.append(piece.data(), piece.size()); });
  }

  // Nothing, and the cursor anywhere, where no number of ordinary length stands here.
  std::optional<std::uint64_t> TakeNumber() {
    std::uint64_t number = 0;
    for (int i = 0; i < kMaxNumberBytes && left_ > 0; ++i) {
      std::uint64_t byte = 0;
      Take(1, [&byte](std::span<const char> piece) {
        byte = static_cast<unsigned char>(piece.front());
      });
      number |= (byte & 0x7f) << (7 * i);
      if (byte < 0x80) return number;
    }
    return std::nullopt;
  }

 private:
  const std::span<const grpc::Slice> slices_;
  std::size_t index_ = 0;
  std::size_t offset_ = 0;  // in slices_[index_]
  std::size_t left_ = 0;
};

// How many bytes the value of a field takes, its tag read; nothing where that is not plain.
std::optional<std::uint64_t> ValueBytes(std::uint64_t tag, Cursor& cursor) {
  constexpr std::uint64_t kVarint = 0, kFixed64 = 1, kDelimited = 2, kFixed32 = 5;
  switch (tag & 7) {
    case kVarint: {
      Cursor ahead = cursor;
      const std::size_t before = ahead.left();
      if (!ahead.TakeNumber().has_value()) return std::nullopt;
      return before - ahead.left();
    }
    case kFixed64:
      return 8;
    case kDelimited:
      return cursor.TakeNumber();
    case kFixed32:
      return 4;
    default:
      return std::nullopt;
  }
}

}  // namespace

SplitMessage SplitLargeEntries(std::span<const grpc::Slice> slices, std::size_t large_bytes) {
  SplitMessage split;
  Cursor cursor(slices);
  std::size_t num_raw = 0;
  while (cursor.left() > 0) {
    Cursor field = cursor;  // its begin
    const std::optional<std::uint64_t> tag = cursor.TakeNumber();
    std::optional<std::uint64_t> bytes;
    // The parser drops what a tag has above 32 bits.
    if (tag.has_value() && *tag <= std::numeric_limits<std::uint32_t>::max()) {
      bytes = ValueBytes(*tag, cursor);
    }
    if (!bytes.has_value() || *bytes > cursor.left() ||
        *bytes > std::numeric_limits<std::int32_t>::max()) {
      field.AppendTo(split.rest, field.left());
      break;
    }
    if (*tag == kRawTag && *bytes >= large_bytes) {
      RawView raw;
      cursor.Take(*bytes, [&raw](std::span<const char> piece) { raw.Append(piece); });
      split.large.emplace_back(num_raw++, std::move(raw));
      split.rest.push_back(static_cast<char>(kRawTag));
      split.rest.push_back('\0');
      continue;
    }
    num_raw += *tag == kRawTag;
    cursor.Take(*bytes, [](std::span<const char>) {});
    field.AppendTo(split.rest, field.left() - cursor.left());
  }
  return split;
}

}  // namespace epserve::coordinator
