#include "client/command/spare_cores.h"

#include <sched.h>

#include <algorithm>
#include <climits>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace epserve::client {
namespace {

constexpr char kMembership[] = "/proc/self/cgroup";
constexpr char kRoot[] = "/sys/fs/cgroup";

std::string Contents(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Whole cores, for part of one cannot be kept busy; but at least 1.
int CoresOf(std::string_view quota, std::string_view period) {
  std::int64_t quota_us = 0;
  std::int64_t period_us = 0;
  const auto number = [](std::string_view text, std::int64_t* value) {
    return absl::SimpleAtoi(absl::string_view(text.data(), text.size()), value) && *value > 0;
  };
  // "max" in version 2 and -1 in version 1 stand for no quota.
  if (!number(quota, &quota_us) || !number(period, &period_us)) return INT_MAX;
  return static_cast<int>(std::clamp<std::int64_t>(quota_us / period_us, 1, INT_MAX));
}

int GrantedBy(const std::string& directory) {
  const std::vector<std::string> limit =
      absl::StrSplit(Contents(directory + "/cpu.max"), absl::ByAnyChar(" \n"), absl::SkipEmpty());
  if (limit.size() == 2) return CoresOf(limit[0], limit[1]);
  const std::vector<std::string> quota =
      absl::StrSplit(Contents(directory + "/cpu.cfs_quota_us"), '\n', absl::SkipEmpty());
  const std::vector<std::string> period =
      absl::StrSplit(Contents(directory + "/cpu.cfs_period_us"), '\n', absl::SkipEmpty());
  return quota.size() == 1 && period.size() == 1 ? CoresOf(quota[0], period[0]) : INT_MAX;
}

}  // namespace

int GrantedCores(const std::string& membership, const std::string& root) {
  int cores = INT_MAX;
  for (const absl::string_view line : absl::StrSplit(membership, '\n', absl::SkipEmpty())) {
    // "0::/a/b" in version 2; "4:cpu,cpuacct:/a/b" in version 1.
    const std::vector<std::string> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (fields.size() != 3) continue;
    const std::vector<std::string> controllers = absl::StrSplit(fields[1], ',');
    const bool unified = fields[0] == "0" && fields[1].empty();
    if (!unified && std::count(controllers.begin(), controllers.end(), "cpu") == 0) continue;
    const std::string mount = unified ? root : root + "/cpu";
    // Every group above this one binds it too. Inside a container the path may be the host's, of
    // which nothing is seen but the mount, which is then the container's own group.
    for (std::string group = fields[2];; group.resize(group.rfind('/'))) {
      while (absl::EndsWith(group, "/")) group.pop_back();
      cores = std::min(cores, GrantedBy(mount + group));
      if (group.find('/') == std::string::npos) break;
    }
  }
  return cores;
}

int AvailableCores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  // Refused where the machine has more cores than the set has room for.
  const int cores = sched_getaffinity(0, sizeof(allowed), &allowed) == 0
                        ? CPU_COUNT(&allowed)
                        : static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, std::min(cores, GrantedCores(Contents(kMembership), kRoot)));
}

}  // namespace epserve::client
