#include "server/common/process_identity.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace epserve::server {
namespace {

std::string ReadWhole(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Empty where one of the two is not to be read.
std::string Home() {
  std::string boot = ReadWhole("/proc/sys/kernel/random/boot_id");
  while (!boot.empty() && boot.back() == '\n') boot.pop_back();
  char name_space[PATH_MAX];
  const ssize_t size = ::readlink("/proc/self/ns/pid", name_space, sizeof(name_space));
  if (boot.empty() || size <= 0 || size == static_cast<ssize_t>(sizeof(name_space))) return "";
  return absl::StrCat(boot, " ", std::string(name_space, static_cast<std::size_t>(size)));
}

// 0: no such process, or none that can be looked at.
std::uint64_t StartTicks(std::int64_t pid) {
  // Field 22 of proc(5). The second is the program's name, which may hold anything; it ends with
  // the last parenthesis, and the third field follows.
  const std::string stat = ReadWhole(absl::StrCat("/proc/", pid, "/stat"));
  const std::size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return 0;
  const std::vector<std::string> fields =
      absl::StrSplit(stat.substr(name_end + 1), ' ', absl::SkipEmpty());
  constexpr std::size_t kStartField = 22 - 3;
  std::uint64_t ticks = 0;
  if (fields.size() <= kStartField || !absl::SimpleAtoi(fields[kStartField], &ticks)) return 0;
  return ticks;
}

}  // namespace

ProcessIdentity OwnProcessIdentity() {
  const std::int64_t pid = ::getpid();
  return {Home(), pid, StartTicks(pid)};
}

absl::StatusOr<runtime::UniqueFd> OpenProcess(const ProcessIdentity& identity) {
  const auto not_found = [&](const std::string& why) {
    return absl::NotFoundError(absl::StrCat("watch process: ", identity.pid, " ", why));
  };
  if (identity.home.empty() || identity.home != Home()) return not_found("is of another machine");
  if (identity.pid <= 0 || identity.pid > INT_MAX) return not_found("is no process id");
  // By number: glibc has the call from 2.36 on. It sets close-on-exec.
  runtime::UniqueFd fd(
      static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(identity.pid), 0)));
  if (!fd.valid()) return not_found(std::strerror(errno));
  // The descriptor holds on to the process that has the id now; this tells which one that is.
  const std::uint64_t ticks = StartTicks(identity.pid);
  if (ticks == 0 || ticks != identity.start_ticks) return not_found("is another process");
  return fd;
}

}  // namespace epserve::server
