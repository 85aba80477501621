#include "runtime/engine/cuda_regions.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// What kernels load and store at a time.
constexpr std::uintptr_t kAlignment = 16;

bool IsAligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kAlignment == 0;
}

class CudaRegion final : public DeviceRegion {
 public:
  CudaRegion(int device, void* data) : device_(device), data_(data) {}
  ~CudaRegion() override {
    cudaError_t closed = cudaSetDevice(device_);
    if (closed == cudaSuccess) closed = cudaIpcCloseMemHandle(data_);
    if (closed == cudaSuccess) return;
    (void)cudaGetLastError();
    LogError("cuda_region_not_closed", {{"error", cudaGetErrorString(closed)}});
  }
  CudaRegion(const CudaRegion&) = delete;
  CudaRegion& operator=(const CudaRegion&) = delete;

  std::byte* data() const override { return static_cast<std::byte*>(data_); }

 private:
  const int device_;
  void* const data_;
};

// What of the allocation lies from `data` on. By the driver, through the runtime, so that the
// program starts where there is no driver.
absl::StatusOr<std::uint64_t> BytesFrom(void* data) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &entry, 12000,
                                                            cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    return absl::InternalError("open region: the driver has no cuMemGetAddressRange; update it");
  }
  const auto get_range = reinterpret_cast<decltype(&cuMemGetAddressRange)>(entry);
  CUdeviceptr base = 0;
  std::size_t size = 0;
  const auto address = reinterpret_cast<CUdeviceptr>(data);
  if (const CUresult result = get_range(&base, &size, address); result != CUDA_SUCCESS) {
    return absl::InternalError(
        absl::StrCat("open region: cuMemGetAddressRange failed with ", static_cast<int>(result)));
  }
  return size - (address - base);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const DeviceRegion>> CudaRegions::Open(
    const DeviceRegionSpec& spec) {
  cudaIpcMemHandle_t handle;
  if (spec.handle.size() != sizeof(handle)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "open region: the handle has ", spec.handle.size(), " bytes, not ", sizeof(handle)));
  }
  std::memcpy(&handle, spec.handle.data(), sizeof(handle));
  int num_devices = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDeviceCount(&num_devices));
  if (spec.device_id < 0 || spec.device_id >= num_devices) {
    return absl::FailedPreconditionError(
        absl::StrCat("open region: device_id ", spec.device_id, " is outside [0, ", num_devices,
                     "), the GPUs that this worker sees; let it see all that clients' memory lies "
                     "on (CUDA_VISIBLE_DEVICES)"));
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaSetDevice(device_));
  void* data = nullptr;
  const cudaError_t opened = cudaIpcOpenMemHandle(&data, handle, cudaIpcMemLazyEnablePeerAccess);
  if (opened != cudaSuccess) {
    (void)cudaGetLastError();
    return absl::FailedPreconditionError(absl::StrCat(
        "open region: cudaIpcOpenMemHandle: ", cudaGetErrorName(opened), " (",
        cudaGetErrorString(opened),
        "); the handle must be of memory from cudaMalloc that is still "
        "allocated, by a process of this worker's machine and IPC namespace, on a GPU that the "
        "worker sees and reaches"));
  }
  auto region = std::make_shared<const CudaRegion>(device_, data);
  EPS_ASSIGN_OR_RETURN(const std::uint64_t available, BytesFrom(data));
  if (spec.size_bytes > available) {
    return absl::InvalidArgumentError(absl::StrCat("open region: byte_size ", spec.size_bytes,
                                                   " exceeds the ", available,
                                                   " bytes of its allocation"));
  }
  return std::shared_ptr<const DeviceRegion>(std::move(region));
}

const std::byte* WholeHidden(std::span<const ShardDeviceRows> rows, std::int64_t num_tokens) {
  if (rows.size() != 1 || rows[0].num_rows != num_tokens || !IsAligned(rows[0].hidden)) {
    return nullptr;
  }
  return rows[0].hidden;
}

std::byte* WholeOutput(std::span<const ShardDeviceRows> rows, std::int64_t num_tokens) {
  if (rows.size() != 1 || rows[0].num_rows != num_tokens || !IsAligned(rows[0].output)) {
    return nullptr;
  }
  return rows[0].output;
}

absl::Status GatherHidden(std::span<const ShardDeviceRows> rows, std::size_t row_bytes,
                          std::byte* gathered, cudaStream_t stream) {
  for (const ShardDeviceRows& piece : rows) {
    if (piece.hidden == nullptr) continue;
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
        gathered + static_cast<std::size_t>(piece.first_row) * row_bytes, piece.hidden,
        static_cast<std::size_t>(piece.num_rows) * row_bytes, cudaMemcpyDefault, stream));
  }
  return absl::OkStatus();
}

absl::Status ScatterOutput(std::span<const ShardDeviceRows> rows, std::size_t row_bytes,
                           const std::byte* gathered, cudaStream_t stream) {
  for (const ShardDeviceRows& piece : rows) {
    if (piece.output == nullptr) continue;
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
        piece.output, gathered + static_cast<std::size_t>(piece.first_row) * row_bytes,
        static_cast<std::size_t>(piece.num_rows) * row_bytes, cudaMemcpyDefault, stream));
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
