#include "runtime/alltoallv/nccl_handle.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

constexpr std::uint64_t kMagic = 0x316c63636e737065;  // "epsnccl1" in memory

struct Encoded {
  std::uint64_t magic = kMagic;
  std::uint64_t epoch = 0;
  std::uint64_t settings_digest = 0;
  std::int32_t rank = 0;
  std::uint32_t reserved = 0;
  char unique_id[128] = {};
};
static_assert(sizeof(Encoded) == 32 + 128);

absl::Status Differs(const char* field, std::uint64_t got, std::uint64_t expected,
                     const char* remedy) {
  return absl::InvalidArgumentError(absl::StrCat("nccl handle: ", field, " ", got,
                                                 " is not the expected ", expected, "; ", remedy));
}

}  // namespace

std::string EncodeNcclHandle(const NcclHandle& handle) {
  Encoded encoded;
  encoded.epoch = handle.epoch;
  encoded.settings_digest = handle.settings_digest;
  encoded.rank = handle.rank;
  std::memcpy(encoded.unique_id, handle.unique_id.data(), handle.unique_id.size());
  return std::string(reinterpret_cast<const char*>(&encoded), sizeof(encoded));
}

absl::StatusOr<NcclHandle> DecodeNcclHandle(std::string_view encoded) {
  Encoded raw;
  if (encoded.size() != sizeof(raw)) {
    return Differs("size", encoded.size(), sizeof(raw),
                   "run the same version and backend everywhere");
  }
  std::memcpy(&raw, encoded.data(), sizeof(raw));
  if (raw.magic != kMagic) {
    return Differs("magic", raw.magic, kMagic, "run the same version and backend everywhere");
  }
  NcclHandle handle;
  handle.rank = raw.rank;
  handle.epoch = raw.epoch;
  handle.settings_digest = raw.settings_digest;
  std::memcpy(handle.unique_id.data(), raw.unique_id, handle.unique_id.size());
  return handle;
}

absl::Status CheckNcclHandle(const NcclHandle& handle, int rank, const NcclHandle& own) {
  if (handle.rank != rank) {
    return absl::InvalidArgumentError(
        absl::StrCat("nccl handle: rank ", handle.rank, " is not the expected ", rank));
  }
  if (handle.epoch != own.epoch) {
    return Differs("epoch", handle.epoch, own.epoch, "it is another epoch's");
  }
  if (handle.settings_digest != own.settings_digest) {
    return Differs("settings_digest", handle.settings_digest, own.settings_digest,
                   "start all workers with the same flags");
  }
  return absl::OkStatus();
}

}  // namespace epserve::runtime
