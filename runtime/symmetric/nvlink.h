// Whether GPUs reach each other over NVLink, as the driver's management library knows it: CUDA
// itself tells only of GPUs that the process sees, and a worker may see none but its own.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_NVLINK_H_
#define EPSERVE_RUNTIME_SYMMETRIC_NVLINK_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::runtime {

using NvmlDevice = void*;

// The functions of NVML that are used, by their names there without version. All return 0 or an
// error. The library comes with the driver, its header with no package of the toolkit's.
struct NvmlApi {
  int (*Init)() = nullptr;
  int (*DeviceGetCount)(unsigned* count) = nullptr;
  int (*DeviceGetHandleByIndex)(unsigned index, NvmlDevice* device) = nullptr;
  int (*DeviceGetHandleByPciBusId)(const char* bus_id, NvmlDevice* device) = nullptr;
  int (*DeviceGetP2PStatus)(NvmlDevice from, NvmlDevice to, int index, int* status) = nullptr;
};

// FAILED_PRECONDITION: no such library, or one that lacks a function.
absl::StatusOr<NvmlApi> OpenNvmlLibrary(const std::string& name);

// OK: the GPU reaches every other one that there is over NVLink, or there is no other. What peers a
// worker may have are among these. FAILED_PRECONDITION says which it does not, or what cannot be
// told.
absl::Status CheckNvLinkOf(const NvmlApi& api, const std::string& pci_bus_id);

// The same of the current CUDA device, by the driver's library.
absl::Status CheckNvLink();

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_NVLINK_H_
