#include "runtime/symmetric/nvlink.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

constexpr char kNvmlLibrary[] = "libnvidia-ml.so.1";
constexpr int kP2pCapsIndexNvLink = 2;  // NVML_P2P_CAPS_INDEX_NVLINK
constexpr int kP2pStatusOk = 0;         // NVML_P2P_STATUS_OK

template <typename Function>
absl::Status FindNvml(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(::dlsym(library, name));
  if (*function != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("nvlink: NVML has no ", name));
}

absl::Status NvmlStatus(int result, const char* call) {
  if (result == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("nvlink: ", call, " failed with ", result));
}

}  // namespace

absl::StatusOr<NvmlApi> OpenNvmlLibrary(const std::string& name) {
  void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("nvlink: ", ::dlerror()));
  }
  NvmlApi api;
  EPS_RETURN_IF_ERROR(FindNvml(library, "nvmlInit_v2", &api.Init));
  EPS_RETURN_IF_ERROR(FindNvml(library, "nvmlDeviceGetCount_v2", &api.DeviceGetCount));
  EPS_RETURN_IF_ERROR(
      FindNvml(library, "nvmlDeviceGetHandleByIndex_v2", &api.DeviceGetHandleByIndex));
  EPS_RETURN_IF_ERROR(
      FindNvml(library, "nvmlDeviceGetHandleByPciBusId_v2", &api.DeviceGetHandleByPciBusId));
  EPS_RETURN_IF_ERROR(FindNvml(library, "nvmlDeviceGetP2PStatus", &api.DeviceGetP2PStatus));
  EPS_RETURN_IF_ERROR(NvmlStatus(api.Init(), "nvmlInit"));
  return api;
}

absl::Status CheckNvLinkOf(const NvmlApi& api, const std::string& pci_bus_id) {
  NvmlDevice own = nullptr;
  EPS_RETURN_IF_ERROR(NvmlStatus(api.DeviceGetHandleByPciBusId(pci_bus_id.c_str(), &own),
                                 "nvmlDeviceGetHandleByPciBusId"));
  unsigned count = 0;
  EPS_RETURN_IF_ERROR(NvmlStatus(api.DeviceGetCount(&count), "nvmlDeviceGetCount"));
  for (unsigned i = 0; i < count; ++i) {
    NvmlDevice other = nullptr;
    EPS_RETURN_IF_ERROR(
        NvmlStatus(api.DeviceGetHandleByIndex(i, &other), "nvmlDeviceGetHandleByIndex"));
    if (other == own) continue;
    int status = -1;
    EPS_RETURN_IF_ERROR(NvmlStatus(api.DeviceGetP2PStatus(own, other, kP2pCapsIndexNvLink, &status),
                                   "nvmlDeviceGetP2PStatus"));
    if (status != kP2pStatusOk) {
      return absl::FailedPreconditionError(absl::StrCat(
          "nvlink: GPU ", pci_bus_id, " does not reach GPU ", i, " of this machine over NVLink"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckNvLink() {
  static const auto* const api = new absl::StatusOr<NvmlApi>(OpenNvmlLibrary(kNvmlLibrary));
  EPS_RETURN_IF_ERROR(api->status());
  int device = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  char bus_id[64] = {};
  EPS_CUDA_RETURN_IF_ERROR(cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), device));
  return CheckNvLinkOf(**api, bus_id);
}

}  // namespace epserve::runtime
