// What a rank's peers open its GPU heap by: how to get at the memory, a secret that only members of
// the epoch learn, and what the heap must be for the two to fit. Travels as opaque bytes.
// Pure functions but for RandomSecret.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_CUDA_HEAP_HANDLE_H_
#define EPSERVE_RUNTIME_SYMMETRIC_CUDA_HEAP_HANDLE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace epserve::runtime {

// How device memory is handed to another process.
enum class HandleType : std::uint32_t {
  kFd = 1,      // a file descriptor over a Unix socket: processes of one host
  kFabric = 2,  // 64 bytes that the driver gave: hosts of one NVLink domain with an IMEX channel
};
std::string_view HandleTypeName(HandleType type);  // "fd", "fabric"

inline constexpr std::size_t kFabricHandleBytes = 64;
using FabricHandle = std::array<std::byte, kFabricHandleBytes>;

struct CudaHeapHandle {
  HandleType type = HandleType::kFd;
  int rank = 0;
  std::uint64_t epoch = 0;
  std::uint64_t bytes = 0;          // of the heap
  std::uint64_t layout_digest = 0;  // differs where the two sides' layouts or settings do
  std::string address;              // kFd: of the handle socket
  std::string secret;               // kFd: what the handle socket asks for
  FabricHandle fabric{};            // kFabric
};

// INVALID_ARGUMENT: address or secret is longer than a handle holds.
absl::StatusOr<std::string> EncodeHandle(const CudaHeapHandle& handle);
// INVALID_ARGUMENT: these bytes are no handle of this version.
absl::StatusOr<CudaHeapHandle> DecodeHandle(std::string_view encoded);

// OK if `handle` is rank `rank`'s of the same epoch, size and layout as `own`. INVALID_ARGUMENT
// names the field that differs.
absl::Status CheckHandle(const CudaHeapHandle& handle, int rank, const CudaHeapHandle& own);

// 32 random bytes of the kernel's.
absl::StatusOr<std::string> RandomSecret();

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_CUDA_HEAP_HANDLE_H_
