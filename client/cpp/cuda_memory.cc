// CudaMemory where the client is built with CUDA.
#include <cuda_runtime_api.h>

#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cpp/cuda_region.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

absl::Status Checked(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  const std::string message = absl::StrCat("cuda memory: ", call, ": ", cudaGetErrorName(error),
                                           " (", cudaGetErrorString(error), ")");
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  return absl::FailedPreconditionError(message);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaMemory>> CudaMemory::Create(std::uint64_t bytes, int device) {
  if (bytes == 0) {
    return absl::InvalidArgumentError("cuda memory: 0 bytes cannot be shared; ask for at least 1");
  }
  int num_devices = 0;
  EPC_RETURN_IF_ERROR(Checked(cudaGetDeviceCount(&num_devices), "cudaGetDeviceCount"));
  if (device < 0 || device >= num_devices) {
    return absl::FailedPreconditionError(absl::StrCat("cuda memory: GPU ", device,
                                                      " is outside [0, ", num_devices,
                                                      "), those that this process sees"));
  }
  EPC_RETURN_IF_ERROR(Checked(cudaSetDevice(device), "cudaSetDevice"));
  std::unique_ptr<CudaMemory> memory(new CudaMemory);
  memory->device_ = device;
  void* data = nullptr;
  EPC_RETURN_IF_ERROR(Checked(cudaMalloc(&data, bytes), "cudaMalloc"));
  memory->data_ = static_cast<std::byte*>(data);
  memory->size_bytes_ = bytes;
  cudaIpcMemHandle_t handle;
  EPC_RETURN_IF_ERROR(Checked(cudaIpcGetMemHandle(&handle, data), "cudaIpcGetMemHandle"));
  memory->handle_.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
  return memory;
}

CudaMemory::~CudaMemory() {
  if (data_ == nullptr) return;
  (void)cudaSetDevice(device_);
  (void)cudaFree(data_);
}

absl::Status CudaMemory::Write(std::uint64_t offset_bytes, std::span<const char> bytes) {
  EPC_RETURN_IF_ERROR(CheckInside(offset_bytes, bytes.size()));
  EPC_RETURN_IF_ERROR(
      Checked(cudaMemcpy(data_ + offset_bytes, bytes.data(), bytes.size(), cudaMemcpyHostToDevice),
              "cudaMemcpy"));
  // A copy from pageable memory may return before it has reached the device.
  return Checked(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
}

absl::Status CudaMemory::Read(std::uint64_t offset_bytes, std::span<char> bytes) const {
  EPC_RETURN_IF_ERROR(CheckInside(offset_bytes, bytes.size()));
  return Checked(
      cudaMemcpy(bytes.data(), data_ + offset_bytes, bytes.size(), cudaMemcpyDeviceToHost),
      "cudaMemcpy");
}

}  // namespace epserve::client
