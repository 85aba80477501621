#include "runtime/symmetric/cuda_heap_handle.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

constexpr std::uint64_t kHandleMagic = 0x3168637573737065;  // "epssuch1" in memory
constexpr std::size_t kMaxAddressBytes = 108;               // of sockaddr_un
constexpr std::size_t kMaxSecretBytes = 64;                 // of the handle socket
constexpr std::size_t kHandleSecretBytes = 32;

struct Encoded {
  std::uint64_t magic = kHandleMagic;
  std::uint32_t type = 0;
  std::int32_t rank = 0;
  std::uint64_t epoch = 0;
  std::uint64_t bytes = 0;
  std::uint64_t layout_digest = 0;
  std::uint32_t address_bytes = 0;
  std::uint32_t secret_bytes = 0;
  char address[kMaxAddressBytes + 4] = {};
  char secret[kMaxSecretBytes] = {};
  std::byte fabric[kFabricHandleBytes] = {};
};
static_assert(sizeof(Encoded) == 48 + 112 + 64 + 64);

absl::Status Differs(const char* field, std::uint64_t got, std::uint64_t expected,
                     const char* remedy) {
  return absl::InvalidArgumentError(absl::StrCat("heap handle: ", field, " ", got,
                                                 " is not the expected ", expected, "; ", remedy));
}

}  // namespace

std::string_view HandleTypeName(HandleType type) {
  return type == HandleType::kFabric ? "fabric" : "fd";
}

absl::StatusOr<std::string> EncodeHandle(const CudaHeapHandle& handle) {
  if (handle.address.size() > kMaxAddressBytes || handle.secret.size() > kMaxSecretBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("heap handle: address of ", handle.address.size(), " and secret of ",
                     handle.secret.size(), " bytes exceed ", kMaxAddressBytes, " and ",
                     kMaxSecretBytes, "; shorten --cluster-id or --handle-dir"));
  }
  Encoded encoded;
  encoded.type = static_cast<std::uint32_t>(handle.type);
  encoded.rank = handle.rank;
  encoded.epoch = handle.epoch;
  encoded.bytes = handle.bytes;
  encoded.layout_digest = handle.layout_digest;
  encoded.address_bytes = static_cast<std::uint32_t>(handle.address.size());
  encoded.secret_bytes = static_cast<std::uint32_t>(handle.secret.size());
  std::memcpy(encoded.address, handle.address.data(), handle.address.size());
  std::memcpy(encoded.secret, handle.secret.data(), handle.secret.size());
  std::memcpy(encoded.fabric, handle.fabric.data(), handle.fabric.size());
  return std::string(reinterpret_cast<const char*>(&encoded), sizeof(encoded));
}

absl::StatusOr<CudaHeapHandle> DecodeHandle(std::string_view encoded) {
  Encoded raw;
  if (encoded.size() != sizeof(raw)) {
    return Differs("size", encoded.size(), sizeof(raw), "run the same version everywhere");
  }
  std::memcpy(&raw, encoded.data(), sizeof(raw));
  if (raw.magic != kHandleMagic) {
    return Differs("magic", raw.magic, kHandleMagic, "run the same version and backend everywhere");
  }
  if (raw.type != static_cast<std::uint32_t>(HandleType::kFd) &&
      raw.type != static_cast<std::uint32_t>(HandleType::kFabric)) {
    return absl::InvalidArgumentError(
        absl::StrCat("heap handle: type ", raw.type, " is neither fd (1) nor fabric (2)"));
  }
  if (raw.address_bytes > kMaxAddressBytes || raw.secret_bytes > kMaxSecretBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "heap handle: address of ", raw.address_bytes, " and secret of ", raw.secret_bytes,
        " bytes exceed ", kMaxAddressBytes, " and ", kMaxSecretBytes));
  }
  CudaHeapHandle handle;
  handle.type = static_cast<HandleType>(raw.type);
  handle.rank = raw.rank;
  handle.epoch = raw.epoch;
  handle.bytes = raw.bytes;
  handle.layout_digest = raw.layout_digest;
  handle.address.assign(raw.address, raw.address_bytes);
  handle.secret.assign(raw.secret, raw.secret_bytes);
  std::memcpy(handle.fabric.data(), raw.fabric, handle.fabric.size());
  return handle;
}

absl::Status CheckHandle(const CudaHeapHandle& handle, int rank, const CudaHeapHandle& own) {
  if (handle.rank != rank) {
    return absl::InvalidArgumentError(
        absl::StrCat("heap handle: rank ", handle.rank, " is not the expected ", rank));
  }
  if (handle.epoch != own.epoch) {
    return Differs("epoch", handle.epoch, own.epoch, "it is another epoch's");
  }
  if (handle.bytes != own.bytes) {
    return Differs("bytes", handle.bytes, own.bytes, "start all workers with the same flags");
  }
  if (handle.layout_digest != own.layout_digest) {
    return Differs("layout_digest", handle.layout_digest, own.layout_digest,
                   "start all workers with the same flags and of the same build");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> RandomSecret() {
  std::string secret(kHandleSecretBytes, '\0');
  if (::getrandom(secret.data(), secret.size(), 0) != static_cast<ssize_t>(secret.size())) {
    return absl::InternalError(
        absl::StrCat("heap handle: getrandom failed: ", std::strerror(errno)));
  }
  return secret;
}

}  // namespace epserve::runtime
