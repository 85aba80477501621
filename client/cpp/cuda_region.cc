#include "client/cpp/cuda_region.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"

namespace epserve::client {

absl::Status CudaMemory::CheckInside(std::uint64_t offset_bytes, std::uint64_t size_bytes) const {
  if (size_bytes <= size_bytes_ && offset_bytes <= size_bytes_ - size_bytes) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("cuda memory: offset ", offset_bytes, " and size ",
                                                 size_bytes, " reach past its ", size_bytes_,
                                                 " bytes"));
}

CudaRegion::CudaRegion(InferenceClient* client, std::string name, absl::Duration timeout,
                       std::unique_ptr<CudaMemory> memory)
    : client_(client), name_(std::move(name)), timeout_(timeout), memory_(std::move(memory)) {}

absl::StatusOr<std::unique_ptr<CudaRegion>> CudaRegion::Create(InferenceClient* client,
                                                               const std::string& name,
                                                               std::uint64_t bytes, int device,
                                                               absl::Duration timeout) {
  EPC_ASSIGN_OR_RETURN(std::unique_ptr<CudaMemory> memory, CudaMemory::Create(bytes, device));
  EPC_RETURN_IF_ERROR(
      client->RegisterCudaRegion({name, memory->handle(), device, memory->size_bytes()}, timeout));
  return std::unique_ptr<CudaRegion>(new CudaRegion(client, name, timeout, std::move(memory)));
}

CudaRegion::~CudaRegion() {
  if (registered_ && !Unregister(timeout_).ok()) (void)memory_.release();
}

absl::Status CudaRegion::Unregister(absl::Duration timeout) {
  if (!registered_) return absl::OkStatus();
  EPC_RETURN_IF_ERROR(client_->UnregisterCudaRegion(name_, timeout));
  registered_ = false;
  return absl::OkStatus();
}

}  // namespace epserve::client
