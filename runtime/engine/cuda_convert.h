// Rows between a request's type and bf16, on the device. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_CONVERT_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_CONVERT_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/base/dtype.h"

namespace epserve::runtime {

// Loads the kernels into the current device, so that no batch waits for that.
absl::Status LoadConvertKernels();

// Enqueue on `stream` and return before they run. `count` elements, a multiple of 4; device memory,
// 16-byte aligned. kFp16 or kFp32 alone. To the nearest; what FP16 cannot hold becomes infinite.
absl::Status LaunchToBf16(DataType from, const void* in, void* out, std::int64_t count,
                          cudaStream_t stream);
absl::Status LaunchFromBf16(DataType to, const void* in, void* out, std::int64_t count,
                            cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_CONVERT_H_
