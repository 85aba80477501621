#include "runtime/microbench/memory_check.h"

#include <cstdint>
#include <fstream>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace epserve::runtime {
namespace {

// 0: not known.
std::uint64_t AvailableBytes() {
  std::ifstream file("/proc/meminfo");
  std::string name;
  std::uint64_t kib = 0;
  while (file >> name >> kib) {
    if (name == "MemAvailable:") return kib * 1024;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return 0;
}

}  // namespace

absl::Status CheckMemoryFor(const std::string& what, double needed_bytes,
                            const std::string& flags) {
  const std::uint64_t available = AvailableBytes();
  if (available == 0 || needed_bytes <= static_cast<double>(available)) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat(what, ": memory of about ", absl::StrFormat("%.3g", needed_bytes),
                   " bytes exceeds the ", available, " bytes available; lower ", flags));
}

}  // namespace epserve::runtime
