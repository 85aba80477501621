#include "server/worker/memory_report.h"

#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace epserve::worker {
namespace {

std::optional<std::uint64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // Not there, or "max".
}

// The value of "`key` 123" or "`key`: 123 kB" in a file of such lines.
std::optional<std::uint64_t> ReadKey(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::uint64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

// What the files of one version of control groups are called.
struct CgroupFiles {
  const char* limit;
  const char* used;
  const char* inactive_cache;  // in memory.stat, of the group and those below it, as the next
  const char* active_cache;
};
constexpr CgroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                   "total_inactive_file", "total_active_file"};
constexpr CgroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file", "active_file"};

// Lowers `available` to what the group in `dir` leaves; `shown` is its name.
void ApplyCgroupLimit(const std::string& dir, const std::string& shown, const CgroupFiles& files,
                      AvailableMemory& available) {
  const auto limit = ReadNumber(absl::StrCat(dir, "/", files.limit));
  const auto used = ReadNumber(absl::StrCat(dir, "/", files.used));
  if (!limit || !used) return;
  // File pages are given back under pressure; pages of /dev/shm are not among these two.
  const std::string stat = dir + "/memory.stat";
  const std::uint64_t cache = ReadKey(stat, files.inactive_cache).value_or(0) +
                              ReadKey(stat, files.active_cache).value_or(0);
  const std::uint64_t held = *used - std::min(cache, *used);
  const std::uint64_t left = *limit - std::min(held, *limit);
  if (left >= available.memory_bytes) return;
  available.memory_bytes = left;
  available.memory_limit =
      absl::StrCat(files.limit, " of control group ", shown.empty() ? "/" : shown);
}

// Lowers `available` to what each control group from the process's own up to the root leaves.
void ApplyCgroupLimits(const std::string& root, AvailableMemory& available) {
  std::ifstream membership(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(membership, line)) {
    // "0::/a/b" in version 2; "4:memory:/a/b" in version 1. A machine may have both.
    const std::vector<std::string> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (fields.size() != 3) continue;
    const std::vector<std::string> controllers = absl::StrSplit(fields[1], ',');
    const bool unified = fields[0] == "0" && fields[1].empty();
    if (!unified && std::count(controllers.begin(), controllers.end(), "memory") == 0) continue;
    const std::string mount = root + (unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    // Inside a container the path may be the host's, of which nothing is seen but the mount, which
    // is then the container's own group.
    for (std::string group = fields[2];; group.resize(group.rfind('/'))) {
      while (group.ends_with('/')) group.pop_back();
      ApplyCgroupLimit(mount + group, group, unified ? kVersion2 : kVersion1, available);
      if (group.find('/') == std::string::npos) break;
    }
  }
}

}  // namespace

absl::StatusOr<AvailableMemory> ReadAvailableMemory(const std::string& root,
                                                    const std::string& shm_dir) {
  const std::string meminfo = root + "/proc/meminfo";
  const auto available_kib = ReadKey(meminfo, "MemAvailable:");
  if (!available_kib) {
    return absl::UnavailableError(
        absl::StrCat("memory: ", meminfo, " has no MemAvailable; cannot tell what fits"));
  }
  AvailableMemory available{.memory_bytes = *available_kib * 1024, .memory_limit = "MemAvailable"};
  ApplyCgroupLimits(root, available);
  struct statvfs shm {};
  if (statvfs(shm_dir.c_str(), &shm) != 0) {
    return absl::UnavailableError(absl::StrCat("memory: statvfs ", shm_dir, ": ",
                                               std::strerror(errno),
                                               "; the heap needs it, mount a tmpfs there"));
  }
  available.shm_bytes = static_cast<std::uint64_t>(shm.f_bavail) * shm.f_frsize;
  return available;
}

absl::StatusOr<AvailableMemory> ReadMemoryFor(const runtime::Engine& engine,
                                              const std::string& root, const std::string& shm_dir) {
  EPS_ASSIGN_OR_RETURN(const std::optional<runtime::DeviceMemory> device,
                       engine.ReadDeviceMemory());
  if (device) {
    return AvailableMemory{.memory_bytes = device->available_bytes,
                           .memory_limit = device->name,
                           .shm_bytes = std::nullopt};
  }
  EPS_ASSIGN_OR_RETURN(AvailableMemory available, ReadAvailableMemory(root, shm_dir));
  available.memory_bytes += engine.held_host_bytes();
  return available;
}

std::uint64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  std::uint64_t size_pages = 0;
  std::uint64_t resident_pages = 0;
  if (!(statm >> size_pages >> resident_pages)) return 0;
  return resident_pages * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

absl::Status CheckMemoryFits(const runtime::MemoryPlan& plan, const AvailableMemory& available) {
  const std::uint64_t total = plan.weight_bytes + plan.heap_bytes + plan.workspace_bytes;
  if (total > available.memory_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("memory: the worker needs ", FormatBytes(total), ", ",
                     FormatBytes(total - available.memory_bytes), " more than the ",
                     FormatBytes(available.memory_bytes), " that ", available.memory_limit,
                     " leaves; spread the experts over more workers or lower --max-batch-tokens"));
  }
  if (available.shm_bytes && plan.heap_bytes > *available.shm_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "memory: the heap needs ", FormatBytes(plan.heap_bytes), ", ",
        FormatBytes(plan.heap_bytes - *available.shm_bytes), " more than the ",
        FormatBytes(*available.shm_bytes),
        " free in /dev/shm; enlarge it (docker: --shm-size) or lower --max-batch-tokens"));
  }
  return absl::OkStatus();
}

std::string MemoryTable(const runtime::MemoryPlan& plan, const AvailableMemory& available) {
  const std::uint64_t total = plan.weight_bytes + plan.heap_bytes + plan.workspace_bytes;
  std::string table = "memory of this worker:\n";
  const auto row = [&table](const std::string& name, std::uint64_t bytes, const std::string& note) {
    table += absl::StrFormat("  %-10s %12s%s\n", name, FormatBytes(bytes),
                             note.empty() ? "" : "  " + note);
  };
  row("weights", plan.weight_bytes, absl::StrCat("held as ", plan.held_type));
  row("heap", plan.heap_bytes,
      available.shm_bytes
          ? absl::StrCat("in /dev/shm, ", FormatBytes(*available.shm_bytes), " free there")
          : "");
  row("workspace", plan.workspace_bytes, "");
  row("total", total,
      absl::StrCat("of ", FormatBytes(available.memory_bytes), " available (",
                   available.memory_limit, ")"));
  return table;
}

void LogMemoryPlan(const runtime::MemoryPlan& plan, const AvailableMemory& available) {
  runtime::LogInfo("memory_plan", {{"weight_bytes", plan.weight_bytes},
                                   {"held_as", plan.held_type},
                                   {"heap_bytes", plan.heap_bytes},
                                   {"workspace_bytes", plan.workspace_bytes},
                                   {"available_bytes", available.memory_bytes},
                                   {"available_in", available.memory_limit}});
  if (available.shm_bytes) {
    runtime::LogInfo("shared_memory", {{"free_bytes", *available.shm_bytes}});
  }
}

std::string FormatBytes(std::uint64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return absl::StrCat(bytes, " B");
  return absl::StrFormat("%.*f %s", value < 10 ? 2 : 1, value, kUnits[unit]);
}

}  // namespace epserve::worker
