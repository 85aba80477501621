// The safetensors format, read strictly:
//
//   u64 little-endian N | N bytes of JSON | the tensors' bytes, without holes
//   {"name": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [begin, end]}, ...}
//
// Offsets count from the end of the JSON. Everything is checked before anything is believed: sizes
// by arithmetic that cannot overflow, types, order, overlap, holes, repeated names. Pure functions.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_SAFETENSORS_H_
#define EPSERVE_RUNTIME_CHECKPOINT_SAFETENSORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/base/dtype.h"
#include "runtime/checkpoint/input_file.h"

namespace epserve::runtime {

// The format's own limit; also what bounds the memory that a hostile header can take.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr int kMaxTensorRank = 8;

struct TensorEntry {
  std::string name;
  std::string dtype;  // As in the file: "BF16", "F8_E4M3", "I64", ...
  std::vector<std::int64_t> shape;
  std::uint64_t offset = 0;  // From the start of the file.
  std::uint64_t bytes = 0;
};

// The type that a stored weight converts from; nothing for types that hold no weights here.
std::optional<DataType> WeightType(std::string_view dtype);

// The tensors of `file` in the order of their bytes. DATA_LOSS, naming file and tensor, for
// anything that the format forbids; INVALID_ARGUMENT for a dtype that is not known.
absl::StatusOr<std::vector<TensorEntry>> ReadSafetensorsHeader(const InputFile& file);

// The same for a header already in memory: `json` between the length and the data of a file of
// `file_bytes` bytes. `file` is named in errors.
absl::StatusOr<std::vector<TensorEntry>> ParseSafetensorsHeader(std::string_view json,
                                                                std::uint64_t file_bytes,
                                                                std::string_view file);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_SAFETENSORS_H_
