#include "server/coordinator/hello_check.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "runtime/base/id.h"
#include "server/coordinator/front_door/quote.h"

namespace epserve::coordinator {
namespace {

// Identifiers go into logs, metrics and messages; longer ones are an accident or an attack.
constexpr std::size_t kMaxIncarnationBytes = 256;

struct Version {
  int major = 0;
  int minor = 0;
};

// Of "1.2.3"; nullopt where it is none.
std::optional<Version> ParseVersion(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, '.');
  Version version;
  if (parts.size() != 3 || !absl::SimpleAtoi(parts[0], &version.major) ||
      !absl::SimpleAtoi(parts[1], &version.minor) || version.major < 0 || version.minor < 0) {
    return std::nullopt;
  }
  return version;
}

// One minor version apart, either way, so that a cluster can be upgraded part by part.
bool WorkTogether(const std::string& a, const std::string& b) {
  const std::optional<Version> one = ParseVersion(a);
  const std::optional<Version> other = ParseVersion(b);
  return one.has_value() && other.has_value() && one->major == other->major &&
         std::abs(one->minor - other->minor) <= 1;
}

absl::Status Differs(const HelloInfo& hello, const std::string& name, const std::string& got,
                     const std::string& expected, const std::string& remedy) {
  return absl::InvalidArgumentError(
      absl::StrCat("join: worker ", hello.worker_id, " has ", name, " ", got,
                   ", which differs from the coordinator's ", expected, "; ", remedy));
}

}  // namespace

absl::Status CheckHello(const HelloInfo& hello, const HelloPolicy& policy) {
  if (!runtime::IsId(hello.worker_id)) {
    return absl::InvalidArgumentError(
        absl::StrCat("join: worker_id ", Quoted(hello.worker_id), " of ", hello.worker_id.size(),
                     " bytes is not 1 to ", runtime::kMaxIdBytes,
                     " of the characters A-Z, a-z, 0-9, '_', '.' and '-'; give another "
                     "--worker-id"));
  }
  if (hello.incarnation.empty() || hello.incarnation.size() > kMaxIncarnationBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("join: incarnation of ", hello.incarnation.size(), " bytes is outside [1, ",
                     kMaxIncarnationBytes, "]"));
  }
  if (!WorkTogether(hello.version, policy.version)) {
    return Differs(hello, "version", hello.version, policy.version,
                   "they may be one minor version apart; upgrade one minor version at a time");
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
