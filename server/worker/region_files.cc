#include "server/worker/region_files.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/symmetric/handle_socket.h"
#include "server/common/region_io.h"

namespace epserve::worker {
namespace {

// The coordinator answers from a thread that does nothing else.
constexpr absl::Duration kFetchTimeout = absl::Seconds(2);

// No region has it: asked for to learn whether anybody answers.
constexpr std::uint64_t kNoRegion = 0;

// What is written between two looks at the lease: under a millisecond of copying.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

absl::Status Named(const absl::Status& status, std::string_view label) {
  return absl::Status(status.code(), absl::StrCat("shared memory: region ", std::string(label),
                                                  ": ", std::string(status.message())));
}

}  // namespace

RegionFiles::RegionFiles(std::string socket, std::string secret)
    : socket_(std::move(socket)), secret_(std::move(secret)) {}

std::shared_ptr<RegionFiles> RegionFiles::Connect(const std::string& socket,
                                                  const std::string& secret) {
  if (socket.empty()) return nullptr;
  const absl::Status reached =
      runtime::FetchHandle(socket, secret, kNoRegion, kFetchTimeout).status();
  if (absl::IsNotFound(reached)) {
    return std::shared_ptr<RegionFiles>(new RegionFiles(socket, secret));
  }
  runtime::LogWarning("regions_not_reached",
                      {{"error", reached},
                       {"effect", "rows in clients' shared memory come through the coordinator"}});
  return nullptr;
}

absl::StatusOr<std::shared_ptr<const runtime::UniqueFd>> RegionFiles::Find(std::uint64_t region) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = open_.find(region);
    if (it != open_.end()) return it->second;
  }
  EPS_ASSIGN_OR_RETURN(runtime::OfferedHandle fetched,
                       runtime::FetchHandle(socket_, secret_, region, kFetchTimeout));
  auto file = std::make_shared<const runtime::UniqueFd>(std::move(fetched.descriptor));
  std::lock_guard<std::mutex> lock(mutex_);
  // Another slot may have been faster; its descriptor is as good.
  return open_.emplace(region, std::move(file)).first->second;
}

void RegionFiles::Forget(std::span<const std::uint64_t> regions) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const std::uint64_t region : regions) open_.erase(region);
}

std::size_t RegionFiles::num_open() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return open_.size();
}

std::vector<RegionFault> RegionFiles::ReadRows(std::span<const RegionRows> sources,
                                               std::int64_t row_bytes, std::byte* rows) {
  std::vector<RegionFault> faults;
  for (const RegionRows& source : sources) {
    const std::span<char> place(reinterpret_cast<char*>(rows + source.first_row * row_bytes),
                                static_cast<std::size_t>(source.num_rows * row_bytes));
    const auto file = Find(source.region);
    const absl::Status read =
        file.ok() ? server::ReadObject((*file)->get(), source.label, source.object_offset, place)
                  : Named(file.status(), source.label);
    if (read.ok()) continue;
    // The batch goes on for the others in it; nobody gets to see what comes of these rows.
    std::fill(place.begin(), place.end(), '\0');
    faults.push_back({source.first_row, read});
  }
  return faults;
}

absl::Status RegionFiles::WriteRows(std::span<const RegionRows> targets, std::int64_t row_bytes,
                                    const std::byte* rows,
                                    const std::function<absl::Status()>& may_write,
                                    std::vector<RegionFault>& faults) {
  for (const RegionRows& target : targets) {
    const bool failed = std::any_of(faults.begin(), faults.end(), [&](const RegionFault& fault) {
      return fault.first_row == target.first_row;
    });
    if (failed) continue;
    const auto file = Find(target.region);
    absl::Status written = file.ok() ? absl::OkStatus() : Named(file.status(), target.label);
    std::span<const char> left(reinterpret_cast<const char*>(rows + target.first_row * row_bytes),
                               static_cast<std::size_t>(target.num_rows * row_bytes));
    std::uint64_t offset = target.object_offset;
    while (written.ok() && !left.empty()) {
      EPS_RETURN_IF_ERROR(may_write());
      const std::span<const char> piece = left.first(std::min(left.size(), kPieceBytes));
      written = server::WriteObject((*file)->get(), target.label, offset, piece);
      left = left.subspan(piece.size());
      offset += piece.size();
    }
    if (!written.ok()) faults.push_back({target.first_row, written});
  }
  return absl::OkStatus();
}

}  // namespace epserve::worker
