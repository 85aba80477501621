// An inference request as validation sees it: plain views into a message that somebody else keeps
// alive and unchanged, so that validation needs no generated code and a test or fuzzer can write
// any request down.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VIEW_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VIEW_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/container/inlined_vector.h"

namespace epserve::coordinator {

struct ParameterView {
  using Value =
      std::variant<std::monostate, bool, std::int64_t, std::string_view, double, std::uint64_t>;

  std::string_view name;
  Value value;  // monostate: the parameter is there, its value is not
};

// Which typed field of a tensor holds elements; kSeveral: more than one does.
enum class TypedKind {
  kNone,
  kBool,
  kInt32,
  kInt64,
  kUint32,
  kUint64,
  kFp32,
  kFp64,
  kBytes,
  kSeveral
};

// The bytes of a tensor: in one piece, or where they are many in the pieces they came in.
class RawView {
 public:
  using Pieces = absl::InlinedVector<std::span<const char>, 1>;

  RawView() = default;
  RawView(std::string_view bytes) {  // NOLINT(google-explicit-constructor): a piece is an entry
    Append({bytes.data(), bytes.size()});
  }
  void Append(std::span<const char> piece) {
    size_ += piece.size();
    pieces_.push_back(piece);
  }
  std::size_t size() const { return size_; }
  const Pieces& pieces() const { return pieces_; }
  // Calls use(piece) for what there is of [offset, offset + size), one piece after another.
  // REQUIRES: that lies within.
  template <typename Use>
  void ForEachPiece(std::size_t offset, std::size_t size, const Use& use) const {
    for (const std::span<const char> piece : pieces_) {
      if (offset >= piece.size()) {
        offset -= piece.size();
        continue;
      }
      const std::size_t here = std::min(piece.size() - offset, size);
      use(piece.subspan(offset, here));
      size -= here;
      offset = 0;
      if (size == 0) return;
    }
  }
  // Copies [offset, offset + out.size()). REQUIRES: that lies within.
  void Copy(std::size_t offset, std::span<char> out) const {
    char* to = out.data();
    ForEachPiece(offset, out.size(),
                 [&to](auto piece) { to = std::copy(piece.begin(), piece.end(), to); });
  }

 private:
  std::size_t size_ = 0;
  Pieces pieces_;
};

struct InputView {
  std::string_view name;
  std::string_view datatype;
  std::span<const std::int64_t> shape;
  std::vector<ParameterView> parameters;
  TypedKind typed_kind = TypedKind::kNone;
  RawView typed_bytes;  // the elements, for kInt32, kInt64 and kFp32
};

struct OutputView {
  std::string_view name;
  std::vector<ParameterView> parameters;
};

struct RequestView {
  std::string_view model_name;
  std::string_view model_version;
  std::vector<ParameterView> parameters;
  std::vector<InputView> inputs;
  std::vector<OutputView> outputs;
  std::vector<RawView> raw_contents;
};

// Bounds on what a request may hold, far above what the served tensors need, so that a message of
// many tiny tensors costs nothing. A view may stop at one entry past a bound.
struct RequestLimits {
  std::size_t max_inputs = 16;
  std::size_t max_outputs = 16;
  std::size_t max_parameters = 64;  // of the request, and of each tensor
  std::size_t max_fields = 1024;    // in all; an element that is not packed is one
  // Beside raw entries and elements.
  std::size_t max_other_bytes = std::size_t{64} << 10;
  // Of packed elements, over all tensors: what the largest batch of the served model has, and of
  // those that have to be parsed no more than a small one. See RequestLimitsOf.
  std::size_t max_int_bytes = std::size_t{1} << 20;
  std::size_t max_fp32_bytes = std::size_t{1} << 20;
  std::size_t max_parsed_fp32_bytes = std::size_t{1} << 20;
  // Raw entries, and fp32_contents in one field, of so many bytes stay in the pieces that they came
  // in.
  std::size_t large_entry_bytes = 64 << 10;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VIEW_H_
