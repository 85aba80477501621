#include "runtime/alltoallv/nccl_api.h"

#include <dlfcn.h>
#include <stdlib.h>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";
constexpr int kMinVersion = NCCL_VERSION(2, 18, 1);  // The first with ncclCommSplit.

// Looks `name` up; fills `function` or says what is missing.
template <typename Function>
absl::Status Find(void* library, const std::string& file, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(::dlsym(library, name));
  if (*function != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("nccl: ", file, " has no ", name,
                                                    "; install NCCL 2.18 or newer of CUDA ",
                                                    CUDART_VERSION / 1000));
}

absl::Status FindAll(void* library, const std::string& file, NcclApi* api) {
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclGetVersion", &api->GetVersion));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclGetUniqueId", &api->GetUniqueId));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclGetErrorString", &api->GetErrorString));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclGetLastError", &api->GetLastError));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclCommInitRankConfig", &api->CommInitRankConfig));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclCommSplit", &api->CommSplit));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclCommAbort", &api->CommAbort));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclCommGetAsyncError", &api->CommGetAsyncError));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclSend", &api->Send));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclRecv", &api->Recv));
  EPS_RETURN_IF_ERROR(Find(library, file, "ncclGroupStart", &api->GroupStart));
  return Find(library, file, "ncclGroupEnd", &api->GroupEnd);
}

}  // namespace

absl::StatusOr<NcclApi> OpenNcclLibrary(const std::string& name) {
  void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("nccl: ", ::dlerror(),
                     "; the nccl backend needs NCCL: install libnccl2, or name its directory in "
                     "LD_LIBRARY_PATH"));
  }
  NcclApi api;
  EPS_RETURN_IF_ERROR(FindAll(library, name, &api));
  int version = 0;
  EPS_RETURN_IF_ERROR(NcclStatus(api, api.GetVersion(&version), "ncclGetVersion", nullptr));
  if (version < kMinVersion) {
    return absl::FailedPreconditionError(absl::StrCat("nccl: version code ", version, " of ", name,
                                                      " is below ", kMinVersion, "; install 2.18"));
  }
  return api;
}

absl::StatusOr<const NcclApi*> LoadNcclApi() {
  static const auto* const loaded = [] {
    // Only sends and receives are used. NVLink multicast is for collectives, takes memory of every
    // communicator, and is a feature that this program stays away from; so it is not asked for.
    ::setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
    return new absl::StatusOr<NcclApi>(OpenNcclLibrary(kLibrary));
  }();
  if (!loaded->ok()) return loaded->status();
  return &loaded->value();
}

absl::Status NcclStatus(const NcclApi& api, ncclResult_t result, const char* call,
                        ncclComm_t comm) {
  if (result == ncclSuccess) return absl::OkStatus();
  const char* const detail = api.GetLastError(comm);
  const std::string message =
      absl::StrCat("nccl: ", call, " failed: ", api.GetErrorString(result),
                   detail != nullptr && detail[0] != '\0' ? absl::StrCat(" (", detail, ")") : "");
  return result == ncclRemoteError || result == ncclSystemError ? absl::UnavailableError(message)
                                                                : absl::InternalError(message);
}

}  // namespace epserve::runtime
