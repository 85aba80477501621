// NCCL's functions, looked up in libnccl.so.2 when they are first needed: programs start, and their
// other backends run, where the library is not installed. Thread-safe.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_NCCL_API_H_
#define EPSERVE_RUNTIME_ALLTOALLV_NCCL_API_H_

#include <nccl.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::runtime {

// The functions that are used, by their names without the prefix. A test may put its own here.
struct NcclApi {
  decltype(&::ncclGetVersion) GetVersion = nullptr;
  decltype(&::ncclGetUniqueId) GetUniqueId = nullptr;
  decltype(&::ncclGetErrorString) GetErrorString = nullptr;
  decltype(&::ncclGetLastError) GetLastError = nullptr;
  decltype(&::ncclCommInitRankConfig) CommInitRankConfig = nullptr;
  decltype(&::ncclCommSplit) CommSplit = nullptr;
  decltype(&::ncclCommAbort) CommAbort = nullptr;
  decltype(&::ncclCommGetAsyncError) CommGetAsyncError = nullptr;
  decltype(&::ncclSend) Send = nullptr;
  decltype(&::ncclRecv) Recv = nullptr;
  decltype(&::ncclGroupStart) GroupStart = nullptr;
  decltype(&::ncclGroupEnd) GroupEnd = nullptr;
};

// Opens the library `name` for as long as the process lives. FAILED_PRECONDITION: it is not there,
// lacks a function, or is older than what communicators are split with.
absl::StatusOr<NcclApi> OpenNcclLibrary(const std::string& name);

// The process's own, opened by the first call. That call sets NCCL's environment too, so it must
// come before the process has a second thread. Errors as OpenNcclLibrary's.
absl::StatusOr<const NcclApi*> LoadNcclApi();

// OK for ncclSuccess. UNAVAILABLE where a peer or the network failed, else INTERNAL; the message
// has the call and NCCL's own words. `comm` may be null.
absl::Status NcclStatus(const NcclApi& api, ncclResult_t result, const char* call, ncclComm_t comm);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_NCCL_API_H_
