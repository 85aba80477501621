#include "server/coordinator/front_door/message_split.h"

#include <algorithm>
#include <utility>

namespace epserve::coordinator {
namespace {

// A place in the slices.
class Cursor {
 public:
  explicit Cursor(std::span<const grpc::Slice> slices) : slices_(slices) {}

  std::size_t at() const { return at_; }

  // Calls use(piece) for the next `count` bytes. REQUIRES: there are so many.
  template <typename Use>
  void Take(std::size_t count, const Use& use) {
    at_ += count;
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

 private:
  const std::span<const grpc::Slice> slices_;
  std::size_t index_ = 0;
  std::size_t offset_ = 0;  // in slices_[index_]
  std::size_t at_ = 0;      // in all of them
};

// Overwrites a number of as many bytes. So nothing around it moves, and one of more bytes than the
// parser takes stays one.
void PutNumber(std::size_t number, std::span<char> out) {
  for (std::size_t i = 0; i < out.size(); ++i, number >>= 7) {
    const std::size_t more = i + 1 < out.size() ? 0x80 : 0;
    out[i] = static_cast<char>((number & 0x7f) | more);
  }
}

}  // namespace

SplitMessage SplitLargeFields(std::span<const grpc::Slice> slices,
                              std::span<const LargeField> large) {
  SplitMessage split;
  std::size_t left = 0;
  for (const grpc::Slice& slice : slices) left += slice.size();
  for (const LargeField& field : large) left -= field.size();
  split.rest.reserve(left);
  split.large.reserve(large.size());
  Cursor cursor(slices);
  for (const LargeField& field : large) {
    const std::size_t cut_before = cursor.at() - split.rest.size();
    cursor.AppendTo(split.rest, field.begin - cursor.at());
    for (const FieldLength& length : field.lengths) {
      PutNumber(length.value - field.size(),
                std::span<char>(split.rest).subspan(length.at - cut_before, length.num_bytes));
    }
    RawView bytes;
    cursor.Take(field.size(), [&bytes](std::span<const char> piece) { bytes.Append(piece); });
    split.large.push_back(std::move(bytes));
  }
  cursor.AppendTo(split.rest, left - split.rest.size());
  return split;
}

}  // namespace epserve::coordinator
