// Reads weights and looks at each on the way: one NaN or Inf in a file, as a broken download or
// conversion leaves them, would make every answer of its expert NaN, with nothing to say why.
//
// Thread-safe: nothing is kept.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_FINITE_READ_H_
#define EPSERVE_RUNTIME_CHECKPOINT_FINITE_READ_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "runtime/base/dtype.h"
#include "runtime/checkpoint/input_file.h"

namespace epserve::runtime {

struct TensorPlace {
  const InputFile& file;
  const std::string& name;  // the tensor's, for errors
  std::uint64_t offset = 0;
  DataType dtype = DataType::kFp32;  // kFp32, kFp16, kBf16, kFp8E4m3
  std::int64_t cols = 1;             // of a row, for errors
};

// Reads elements [first, first + count) of the tensor to `out`. DATA_LOSS names file and tensor,
// and where one of them is NaN or Inf its row and column.
absl::Status ReadFinite(const TensorPlace& tensor, std::uint64_t first, std::uint64_t count,
                        void* out);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_FINITE_READ_H_
