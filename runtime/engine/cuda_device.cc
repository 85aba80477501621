#include "runtime/engine/cuda_device.h"

#include <stdlib.h>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/engine/cuda_engine.h"

namespace epserve::runtime {
namespace {

constexpr int kMinComputeCapability = 9;

// Before the first CUDA call: queues for all slots' streams, and kernels loaded at start. A kernel
// loaded at its first launch waits for the device, where another slot's may be waiting for a peer.
void PrepareProcess() {
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", /*overwrite=*/0);
  ::setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
}

}  // namespace

int NumCudaDevices() {
  PrepareProcess();
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

absl::StatusOr<cudaDeviceProp> FindCudaDevice(int device) {
  const int count = NumCudaDevices();
  if (count == 0) {
    return absl::FailedPreconditionError(
        "create engine: the cuda and nccl backends need a GPU and its driver, and this process "
        "sees none; "
        "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --backend=host");
  }
  if (device < 0 || device >= count) {
    return absl::FailedPreconditionError(absl::StrCat("create engine: device ", device,
                                                      " is outside [0, ", count,
                                                      "), the GPUs that this process sees"));
  }
  cudaDeviceProp properties;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, device));
  if (properties.major < kMinComputeCapability) {
    return absl::FailedPreconditionError(
        absl::StrCat("create engine: GPU ", device, " (", properties.name,
                     ") has compute capability ", properties.major, ".", properties.minor,
                     ", below ", kMinComputeCapability, ".0; use an H100 or newer"));
  }
  return properties;
}

}  // namespace epserve::runtime
