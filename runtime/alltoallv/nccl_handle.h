// What a rank's peers need to join it in the epoch's communicators: rank 0's has NCCL's unique id,
// and every rank's says what the two sides must have alike. Travels as opaque bytes. Pure
// functions.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_NCCL_HANDLE_H_
#define EPSERVE_RUNTIME_ALLTOALLV_NCCL_HANDLE_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::runtime {

struct NcclHandle {
  int rank = 0;
  std::uint64_t epoch = 0;
  std::uint64_t settings_digest = 0;     // differs where the two sides' settings do
  std::array<char, 128> unique_id = {};  // of rank 0; zeros elsewhere
};

std::string EncodeNcclHandle(const NcclHandle& handle);
// INVALID_ARGUMENT: these bytes are no handle of this version and backend.
absl::StatusOr<NcclHandle> DecodeNcclHandle(std::string_view encoded);

// OK if `handle` is rank `rank`'s of the same epoch and settings as `own`. INVALID_ARGUMENT names
// the field that differs.
absl::Status CheckNcclHandle(const NcclHandle& handle, int rank, const NcclHandle& own);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_NCCL_HANDLE_H_
