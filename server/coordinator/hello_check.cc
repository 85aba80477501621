#include "server/coordinator/hello_check.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/coordinator/front_door/quote.h"

namespace epserve::coordinator {
namespace {

// Identifiers go into logs, metrics and messages; longer ones are an accident or an attack.
constexpr std::size_t kMaxIdBytes = 256;
constexpr std::size_t kMaxWorkerIdBytes = 64;

bool IsWorkerId(std::string_view id) {
  const auto allowed = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '-';
  };
  return !id.empty() && id.size() <= kMaxWorkerIdBytes &&
         std::all_of(id.begin(), id.end(), allowed);
}

// "1.2" of "1.2.3"; empty where there is none.
std::string_view MajorMinor(std::string_view version) {
  const std::size_t first = version.find('.');
  if (first == version.npos) return {};
  return version.substr(0, version.find('.', first + 1));
}

absl::Status Differs(const HelloInfo& hello, const std::string& name, const std::string& got,
                     const std::string& expected, const std::string& remedy) {
  return absl::InvalidArgumentError(
      absl::StrCat("join: worker ", hello.worker_id, " has ", name, " ", got,
                   ", which differs from the coordinator's ", expected, "; ", remedy));
}

}  // namespace

absl::Status CheckHello(const HelloInfo& hello, const HelloPolicy& policy) {
  if (!IsWorkerId(hello.worker_id)) {
    return absl::InvalidArgumentError(
        absl::StrCat("join: worker_id ", Quoted(hello.worker_id), " of ", hello.worker_id.size(),
                     " bytes is not 1 to ", kMaxWorkerIdBytes,
                     " of the characters A-Z, a-z, 0-9, '_', '.' and '-'; give another "
                     "--worker-id"));
  }
  if (hello.incarnation.empty() || hello.incarnation.size() > kMaxIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("join: incarnation of ",
                                                   hello.incarnation.size(),
                                                   " bytes is outside [1, ", kMaxIdBytes, "]"));
  }
  if (MajorMinor(hello.version).empty() ||
      MajorMinor(hello.version) != MajorMinor(policy.version)) {
    return Differs(hello, "version", hello.version, policy.version,
                   "run the same major.minor version everywhere");
  }
  if (hello.cluster_id != policy.cluster_id) {
    return Differs(hello, "cluster_id", hello.cluster_id, policy.cluster_id,
                   "give both the same --cluster-id");
  }
  if (std::find(policy.backends.begin(), policy.backends.end(), hello.backend) ==
      policy.backends.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("join: worker ", hello.worker_id, " has backend \"", hello.backend,
                     "\", which is none of ", absl::StrJoin(policy.backends, ", ")));
  }
  if (hello.fingerprint != policy.fingerprint) {
    return Differs(hello, "model fingerprint", hello.fingerprint, policy.fingerprint,
                   "give both the same checkpoint, weights included");
  }
  if (hello.max_batch_tokens != policy.max_batch_tokens) {
    return Differs(hello, "max_batch_tokens", std::to_string(hello.max_batch_tokens),
                   std::to_string(policy.max_batch_tokens),
                   "give both the same --max-batch-tokens");
  }
  if (hello.num_slots != policy.num_slots) {
    return Differs(hello, "num_slots", std::to_string(hello.num_slots),
                   std::to_string(policy.num_slots), "give both the same --slots");
  }
  return absl::OkStatus();
}

}  // namespace epserve::coordinator
