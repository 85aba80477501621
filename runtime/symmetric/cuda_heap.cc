#include "runtime/symmetric/cuda_heap.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

// The driver's entry points, looked up at run time: a binary that links libcuda would not even
// start on a machine without a GPU.
struct Driver {
  decltype(&cuMemCreate) mem_create = nullptr;
  decltype(&cuMemRelease) mem_release = nullptr;
  decltype(&cuMemExportToShareableHandle) mem_export = nullptr;
  decltype(&cuMemImportFromShareableHandle) mem_import = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) address_free = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
};

template <typename Function>
absl::Status Look(const char* name, Function* out) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  EPS_CUDA_RETURN_IF_ERROR(
      cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("symmetric heap: this driver has no ", name, "; CUDA 12 or newer is needed"));
  }
  *out = reinterpret_cast<Function>(entry);
  return absl::OkStatus();
}

absl::StatusOr<Driver> LoadDriver() {
  Driver d;
  EPS_RETURN_IF_ERROR(Look("cuMemCreate", &d.mem_create));
  EPS_RETURN_IF_ERROR(Look("cuMemRelease", &d.mem_release));
  EPS_RETURN_IF_ERROR(Look("cuMemExportToShareableHandle", &d.mem_export));
  EPS_RETURN_IF_ERROR(Look("cuMemImportFromShareableHandle", &d.mem_import));
  EPS_RETURN_IF_ERROR(Look("cuMemGetAllocationGranularity", &d.granularity));
  EPS_RETURN_IF_ERROR(Look("cuMemAddressReserve", &d.reserve));
  EPS_RETURN_IF_ERROR(Look("cuMemAddressFree", &d.address_free));
  EPS_RETURN_IF_ERROR(Look("cuMemMap", &d.map));
  EPS_RETURN_IF_ERROR(Look("cuMemUnmap", &d.unmap));
  EPS_RETURN_IF_ERROR(Look("cuMemSetAccess", &d.set_access));
  return d;
}

absl::StatusOr<const Driver*> GetDriver() {
  static const absl::StatusOr<Driver>* driver = new absl::StatusOr<Driver>(LoadDriver());
  if (!driver->ok()) return driver->status();
  return &driver->value();
}

CUmemAllocationHandleType DriverType(HandleType type) {
  return type == HandleType::kFabric ? CU_MEM_HANDLE_TYPE_FABRIC
                                     : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
}

absl::StatusOr<CUmemAllocationProp> CurrentDeviceProperties(HandleType type) {
  int device = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  EPS_CUDA_RETURN_IF_ERROR(cudaFree(nullptr));  // Makes the primary context exist.
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = DriverType(type);
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

}  // namespace

absl::StatusOr<DeviceAllocation> DeviceAllocation::Create(std::size_t bytes, HandleType type) {
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  EPS_ASSIGN_OR_RETURN(const CUmemAllocationProp properties, CurrentDeviceProperties(type));
  std::size_t granularity = 0;
  EPS_DRIVER_RETURN_IF_ERROR(
      driver->granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  DeviceAllocation result;
  const std::size_t rounded = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle handle = 0;
  const CUresult created = driver->mem_create(&handle, rounded, &properties, 0);
  if (created == CUDA_ERROR_OUT_OF_MEMORY) {
    std::size_t free_bytes = 0, total_bytes = 0;
    EPS_CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
    return absl::ResourceExhaustedError(
        absl::StrCat("symmetric heap: ", rounded, " bytes do not fit device ",
                     properties.location.id, ", which has ", free_bytes, " of ", total_bytes,
                     " free; lower --max-batch-tokens or --slots"));
  }
  EPS_DRIVER_RETURN_IF_ERROR(created);
  result.handle_ = handle;
  result.bytes_ = rounded;
  return result;
}

absl::StatusOr<DeviceAllocation> DeviceAllocation::Import(int fd, std::size_t bytes) {
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  EPS_CUDA_RETURN_IF_ERROR(cudaFree(nullptr));
  DeviceAllocation result;
  CUmemGenericAllocationHandle handle = 0;
  EPS_DRIVER_RETURN_IF_ERROR(
      driver->mem_import(&handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)),
                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  result.handle_ = handle;
  result.bytes_ = bytes;
  return result;
}

absl::StatusOr<DeviceAllocation> DeviceAllocation::Import(const FabricHandle& fabric,
                                                          std::size_t bytes) {
  static_assert(sizeof(CUmemFabricHandle) == kFabricHandleBytes);
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  EPS_CUDA_RETURN_IF_ERROR(cudaFree(nullptr));
  CUmemFabricHandle shared;
  std::memcpy(&shared, fabric.data(), sizeof(shared));
  DeviceAllocation result;
  CUmemGenericAllocationHandle handle = 0;
  EPS_DRIVER_RETURN_IF_ERROR(driver->mem_import(&handle, &shared, CU_MEM_HANDLE_TYPE_FABRIC));
  result.handle_ = handle;
  result.bytes_ = bytes;
  return result;
}

DeviceAllocation::~DeviceAllocation() {
  if (handle_ != 0) (void)(*GetDriver())->mem_release(handle_);
}

absl::StatusOr<UniqueFd> DeviceAllocation::Export() const {
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  int fd = -1;
  EPS_DRIVER_RETURN_IF_ERROR(
      driver->mem_export(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  return UniqueFd(fd);
}

absl::StatusOr<FabricHandle> DeviceAllocation::ExportFabric() const {
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  CUmemFabricHandle shared;
  EPS_DRIVER_RETURN_IF_ERROR(driver->mem_export(&shared, handle_, CU_MEM_HANDLE_TYPE_FABRIC, 0));
  FabricHandle fabric;
  std::memcpy(fabric.data(), &shared, sizeof(shared));
  return fabric;
}

absl::Status ProbeFabricHandles() {
  const auto probe = []() -> absl::Status {
    EPS_ASSIGN_OR_RETURN(const DeviceAllocation allocation,
                         DeviceAllocation::Create(1, HandleType::kFabric));
    EPS_ASSIGN_OR_RETURN(const FabricHandle fabric, allocation.ExportFabric());
    return DeviceAllocation::Import(fabric, allocation.bytes()).status();
  };
  const absl::Status status = probe();
  if (status.ok()) return status;
  return absl::FailedPreconditionError(
      absl::StrCat("symmetric heap: this driver grants no fabric handles (",
                   std::string(status.message()), "); they need an IMEX channel, or use fd"));
}

absl::StatusOr<AddressRange> AddressRange::Reserve(std::size_t bytes) {
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  AddressRange result;
  CUdeviceptr address = 0;
  EPS_DRIVER_RETURN_IF_ERROR(driver->reserve(&address, bytes, 0, 0, 0));
  result.address_ = address;
  result.bytes_ = bytes;
  return result;
}

AddressRange::~AddressRange() {
  if (address_ != 0) (void)(*GetDriver())->address_free(address_, bytes_);
}

absl::StatusOr<DeviceMapping> DeviceMapping::Map(DeviceAllocation allocation) {
  EPS_ASSIGN_OR_RETURN(const Driver* driver, GetDriver());
  int device = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  DeviceMapping result;
  EPS_ASSIGN_OR_RETURN(result.range_, AddressRange::Reserve(allocation.bytes()));
  result.allocation_ = std::move(allocation);
  EPS_DRIVER_RETURN_IF_ERROR(driver->map(result.range_.address(), result.allocation_.bytes(), 0,
                                         result.allocation_.handle(), 0));
  result.mapped_ = true;
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  EPS_DRIVER_RETURN_IF_ERROR(
      driver->set_access(result.range_.address(), result.allocation_.bytes(), &access, 1));
  return result;
}

DeviceMapping::~DeviceMapping() {
  if (mapped_) (void)(*GetDriver())->unmap(range_.address(), allocation_.bytes());
}

}  // namespace epserve::runtime
