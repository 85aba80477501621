// CudaMemory where the client is built without CUDA: there is none.
#include <memory>

#include "client/cpp/cuda_region.h"

namespace epserve::client {
namespace {

absl::Status NotInThisBuild() {
  return absl::FailedPreconditionError(
      "cuda memory: this client was built without CUDA; build where nvcc is, or use system shared "
      "memory");
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaMemory>> CudaMemory::Create(std::uint64_t, int) {
  return NotInThisBuild();
}

CudaMemory::~CudaMemory() = default;

absl::Status CudaMemory::Write(std::uint64_t, std::span<const char>) { return NotInThisBuild(); }

absl::Status CudaMemory::Read(std::uint64_t, std::span<char>) const { return NotInThisBuild(); }

}  // namespace epserve::client
