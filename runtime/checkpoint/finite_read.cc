#include "runtime/checkpoint/finite_read.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

// What was just read is looked at while it is in the cache: of a load from the page cache into fp32
// that takes 1 to 4 % of the processor's time, by the type.
constexpr std::uint64_t kPieceBytes = 256 << 10;

}  // namespace

absl::Status ReadFinite(const TensorPlace& tensor, std::uint64_t first, std::uint64_t count,
                        void* out) {
  const std::uint64_t element_bytes = DataTypeBytes(tensor.dtype);
  auto* place = static_cast<char*>(out);
  const std::uint64_t end = first + count;
  while (first < end) {
    const std::uint64_t piece = std::min(end - first, kPieceBytes / element_bytes);
    const absl::Status read =
        tensor.file.ReadAt(tensor.offset + first * element_bytes, place, piece * element_bytes);
    if (!read.ok()) {
      return absl::Status(read.code(), absl::StrCat(std::string(read.message()), " (tensor \"",
                                                    tensor.name, "\")"));
    }
    const std::size_t bad = FindNonFinite(tensor.dtype, place, piece);
    if (bad < piece) {
      const auto cols = static_cast<std::uint64_t>(tensor.cols);
      float value = 0;
      ConvertToFloat(tensor.dtype, place + bad * element_bytes, &value, 1);
      return absl::DataLossError(
          absl::StrCat("checkpoint: ", tensor.file.name(), ": tensor \"", tensor.name, "\" has ",
                       value, " at [", (first + bad) / cols, ", ", (first + bad) % cols,
                       "], which is no finite weight; fetch or convert the checkpoint anew"));
    }
    place += piece * element_bytes;
    first += piece;
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
