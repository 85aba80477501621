#include "server/coordinator/front_door/shm_registry.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/common/region_io.h"
#include "server/coordinator/front_door/quote.h"

namespace epserve::coordinator {
namespace {

constexpr std::size_t kMaxNameBytes = 256;
// NAME_MAX of the file system behind shm_open.
constexpr std::size_t kMaxKeyBytes = 255;
// The service's own symmetric heaps: never a client's, whatever prefixes are allowed.
constexpr const char* kReservedKeyPrefix = "epserve-";
// Semaphores, which are no memory.
constexpr const char* kSemaphoreKeyPrefix = "sem.";
// sizeof(cudaIpcMemHandle_t)
constexpr std::size_t kCudaHandleBytes = 64;

bool StartsWith(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

bool IsKeyCharacter(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
         c == '.' || c == '-';
}

using server::Fits;

absl::Status CheckNameAndSize(std::string_view name, std::uint64_t size_bytes) {
  if (name.empty() || name.size() > kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("register: a region's name has ", name.size(),
                                                   " bytes, not 1 to ", kMaxNameBytes));
  }
  if (size_bytes == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("register: region ", Quoted(name), " has byte_size 0; give at least 1"));
  }
  return absl::OkStatus();
}

absl::Status OpenError(std::string_view name, int error) {
  const std::string region = absl::StrCat("register: region ", Quoted(name));
  if (error == ENOENT) {
    return absl::NotFoundError(absl::StrCat(
        region, " names a shared-memory object that does not exist; create it before registering"));
  }
  if (error == EACCES || error == EPERM) {
    return absl::PermissionDeniedError(absl::StrCat(
        region, " names a shared-memory object that the server may not read and write; run client ",
        "and server as the same user"));
  }
  // EINVAL: what glibc makes of a directory.
  if (error == ELOOP || error == EISDIR || error == EINVAL || error == ENXIO || error == ENODEV) {
    return absl::InvalidArgumentError(
        absl::StrCat(region, " does not name a regular shared-memory object"));
  }
  return absl::InternalError(absl::StrCat(region, ": shm_open: ", std::strerror(error)));
}

absl::StatusOr<runtime::UniqueFd> OpenObject(std::string_view name, const std::string& key,
                                             std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  // O_NONBLOCK: an object that is not a regular file must not hold the server up before it is
  // refused. shm_open adds O_NOFOLLOW and O_CLOEXEC.
  runtime::UniqueFd fd(::shm_open(absl::StrCat("/", key).c_str(), O_RDWR | O_NONBLOCK, 0));
  if (!fd.valid()) return OpenError(name, errno);
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0) {
    return absl::InternalError(
        absl::StrCat("register: region ", Quoted(name), ": fstat: ", std::strerror(errno)));
  }
  if (!S_ISREG(info.st_mode)) return OpenError(name, ENODEV);
  if (info.st_uid != ::geteuid()) return OpenError(name, EACCES);
  const auto object_bytes = static_cast<std::uint64_t>(std::max<off_t>(info.st_size, 0));
  if (!Fits(offset_bytes, size_bytes, object_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "register: region ", Quoted(name), " offset ", offset_bytes, " and byte_size ", size_bytes,
        " reach past its shared-memory object of ", object_bytes, " bytes"));
  }
  return fd;
}

}  // namespace

ShmRegion::ShmRegion(ShmRegionInfo info, runtime::UniqueFd fd)
    : info_(std::move(info)), label_(Quoted(info_.name)), fd_(std::move(fd)) {}

absl::Status ShmRegion::CheckInside(std::uint64_t offset_bytes, std::uint64_t size_bytes) const {
  if (Fits(offset_bytes, size_bytes, info_.size_bytes)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("shared memory: offset ", offset_bytes,
                                                 " and size ", size_bytes, " reach past region ",
                                                 label_, " of ", info_.size_bytes, " bytes"));
}

absl::Status ShmRegion::CheckWindow(std::uint64_t offset_bytes, std::uint64_t size_bytes) const {
  EPS_RETURN_IF_ERROR(CheckInside(offset_bytes, size_bytes));
  if (is_cuda()) return absl::OkStatus();
  return server::CheckObjectReaches(fd_.get(), label_, ObjectOffset(offset_bytes), size_bytes);
}

absl::Status ShmRegion::Read(std::uint64_t offset_bytes, std::span<char> destination) const {
  EPS_RETURN_IF_ERROR(CheckInside(offset_bytes, destination.size()));
  return server::ReadObject(fd_.get(), label_, ObjectOffset(offset_bytes), destination);
}

absl::Status ShmRegion::Write(std::uint64_t offset_bytes, std::span<const char> source) const {
  EPS_RETURN_IF_ERROR(CheckInside(offset_bytes, source.size()));
  return server::WriteObject(fd_.get(), label_, ObjectOffset(offset_bytes), source);
}

absl::StatusOr<runtime::UniqueFd> ShmRegion::DuplicateDescriptor() const {
  runtime::UniqueFd copy(::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
  if (copy.valid()) return copy;
  return absl::InternalError(
      absl::StrCat("shared memory: region ", label_, ": fcntl: ", std::strerror(errno)));
}

bool ShmRegion::OverlapsShifted(std::uint64_t offset_bytes, const ShmRegion& other,
                                std::uint64_t other_offset_bytes, std::uint64_t size_bytes) const {
  const std::uint64_t mine = ObjectOffset(offset_bytes);
  const std::uint64_t theirs = other.ObjectOffset(other_offset_bytes);
  if (mine == theirs) return false;
  if (std::max(mine, theirs) - std::min(mine, theirs) >= size_bytes) return false;
  if (is_cuda() || other.is_cuda()) {
    return info_.kind == other.info_.kind && info_.handle == other.info_.handle;
  }
  struct stat own = {};
  struct stat of_other = {};
  // An object that cannot be looked at is taken for the same one: that only costs a copy.
  if (::fstat(fd_.get(), &own) != 0 || ::fstat(other.fd_.get(), &of_other) != 0) return true;
  return own.st_dev == of_other.st_dev && own.st_ino == of_other.st_ino;
}

bool IsKeyPrefix(std::string_view prefix) {
  return prefix.size() <= kMaxKeyBytes &&
         std::all_of(prefix.begin(), prefix.end(), IsKeyCharacter) &&
         !StartsWith(prefix, kSemaphoreKeyPrefix) && !StartsWith(prefix, kReservedKeyPrefix);
}

ShmRegistry::ShmRegistry(ShmOptions options) : options_(std::move(options)) {}

absl::Status ShmRegistry::CheckAllowed() const {
  if (options_.allowed) return absl::OkStatus();
  return absl::UnimplementedError(
      "shared memory: clients' regions are switched off on this server; send tensors inline, or "
      "start the coordinator with --allow-client-shm");
}

absl::Status ShmRegistry::CheckKey(std::string_view name, std::string_view key) const {
  const std::string region = absl::StrCat("register: the key of region ", Quoted(name));
  if (key.empty() || key.size() > kMaxKeyBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(region, " has ", key.size(),
                     " characters after its leading slashes, not 1 to ", kMaxKeyBytes));
  }
  if (!std::all_of(key.begin(), key.end(), IsKeyCharacter)) {
    return absl::InvalidArgumentError(
        absl::StrCat(region, " has a character outside [A-Za-z0-9_.-]"));
  }
  if (key == "." || key == ".." || StartsWith(key, kSemaphoreKeyPrefix) ||
      StartsWith(key, kReservedKeyPrefix)) {
    return absl::InvalidArgumentError(absl::StrCat(region,
                                                   " is a reserved one: '.', '..', 'sem.*' and '",
                                                   kReservedKeyPrefix, "*' are not for clients"));
  }
  const auto& prefixes = options_.key_prefixes;
  const bool prefixed =
      prefixes.empty() || std::any_of(prefixes.begin(), prefixes.end(),
                                      [key](const std::string& p) { return StartsWith(key, p); });
  if (!prefixed) {
    return absl::InvalidArgumentError(
        absl::StrCat(region, " begins with none of the prefixes that this server allows"));
  }
  return absl::OkStatus();
}

absl::Status ShmRegistry::CheckRoom(std::string_view name, std::uint64_t size_bytes) const {
  if (regions_.find(name) != regions_.end()) {
    return absl::AlreadyExistsError(absl::StrCat("register: region ", Quoted(name),
                                                 " is already registered; unregister it first"));
  }
  if (regions_.size() >= options_.max_regions) {
    return absl::ResourceExhaustedError(absl::StrCat("register: region ", Quoted(name),
                                                     " would be one more than the limit of ",
                                                     options_.max_regions, " regions"));
  }
  if (!Fits(total_bytes_, size_bytes, options_.max_total_bytes)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "register: region ", Quoted(name), " of ", size_bytes, " bytes, on top of ", total_bytes_,
        " registered, exceeds the limit of ", options_.max_total_bytes, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status ShmRegistry::Register(std::string_view name, std::string_view key,
                                   std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  EPS_RETURN_IF_ERROR(CheckAllowed());
  EPS_RETURN_IF_ERROR(CheckNameAndSize(name, size_bytes));
  if (!Fits(offset_bytes, size_bytes, std::numeric_limits<off_t>::max())) {
    return absl::InvalidArgumentError(absl::StrCat("register: region ", Quoted(name), " offset ",
                                                   offset_bytes, " and byte_size ", size_bytes,
                                                   " reach past every file's end"));
  }
  // Stripped before anything looks at the key: a slash must not carry it past the prefix check.
  const std::string stripped(key.substr(std::min(key.find_first_not_of('/'), key.size())));
  EPS_RETURN_IF_ERROR(CheckKey(name, stripped));
  absl::MutexLock lock(&mutex_);
  EPS_RETURN_IF_ERROR(CheckRoom(name, size_bytes));
  EPS_ASSIGN_OR_RETURN(runtime::UniqueFd fd, OpenObject(name, stripped, offset_bytes, size_bytes));
  ShmRegionInfo info;
  info.name = std::string(name);
  info.key = std::string(key);
  info.offset_bytes = offset_bytes;
  info.size_bytes = size_bytes;
  Add(std::move(info), std::move(fd));
  return absl::OkStatus();
}

std::shared_ptr<ShmRegion> ShmRegistry::Add(ShmRegionInfo info, runtime::UniqueFd fd) {
  std::erase_if(alive_, [](const auto& entry) { return entry.second.expired(); });
  info.id = next_id_++;
  auto region = std::make_shared<ShmRegion>(std::move(info), std::move(fd));
  if (!region->is_cuda()) alive_.emplace(region->info().id, region);
  regions_.emplace(region->info().name, region);
  total_bytes_ += region->info().size_bytes;
  return region;
}

absl::StatusOr<std::shared_ptr<const ShmRegion>> ShmRegistry::ReserveCuda(
    std::string_view name, std::string_view handle, std::int64_t device_id,
    std::uint64_t size_bytes) {
  EPS_RETURN_IF_ERROR(CheckAllowed());
  EPS_RETURN_IF_ERROR(CheckNameAndSize(name, size_bytes));
  if (handle.size() != kCudaHandleBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "register: region ", Quoted(name), " has a raw_handle of ", handle.size(), " bytes, not ",
        kCudaHandleBytes, "; give the whole cudaIpcMemHandle_t, as it is and not in base64"));
  }
  if (device_id < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("register: region ", Quoted(name), " has device_id ", device_id, ", below 0"));
  }
  absl::MutexLock lock(&mutex_);
  EPS_RETURN_IF_ERROR(CheckRoom(name, size_bytes));
  ShmRegionInfo info;
  info.name = std::string(name);
  info.size_bytes = size_bytes;
  info.kind = ShmKind::kCuda;
  info.handle = std::string(handle);
  info.device_id = device_id;
  const std::shared_ptr<ShmRegion> region = Add(std::move(info), runtime::UniqueFd());
  region->pending_ = true;
  return std::shared_ptr<const ShmRegion>(region);
}

absl::Status ShmRegistry::Confirm(const ShmRegion& region) {
  absl::MutexLock lock(&mutex_);
  const auto it = regions_.find(region.info().name);
  if (it == regions_.end() || it->second.get() != &region) {
    return absl::AbortedError(absl::StrCat("register: region ", region.label(),
                                           " was unregistered while it was being registered"));
  }
  it->second->pending_ = false;
  return absl::OkStatus();
}

void ShmRegistry::Withdraw(const ShmRegion& region) {
  std::shared_ptr<ShmRegion> taken;
  absl::MutexLock lock(&mutex_);
  const auto it = regions_.find(region.info().name);
  if (it == regions_.end() || it->second.get() != &region) return;
  total_bytes_ -= region.info().size_bytes;
  taken = std::move(it->second);
  regions_.erase(it);
}

absl::Status ShmRegistry::Unregister(ShmKind kind, std::string_view name, Released released) {
  EPS_RETURN_IF_ERROR(CheckAllowed());
  auto ids = std::make_shared<std::vector<std::uint64_t>>();
  std::shared_ptr<void> on_release;
  std::vector<std::shared_ptr<ShmRegion>> taken;  // Closed after the lock is given up.
  absl::MutexLock lock(&mutex_);
  const auto named = regions_.find(name);
  if (named != regions_.end() && named->second->info().kind != kind) {
    return absl::InvalidArgumentError(absl::StrCat(
        "unregister: region ", Quoted(name), " is ",
        kind == ShmKind::kCuda ? "system shared memory; use SystemSharedMemoryUnregister"
                               : "CUDA shared memory; use CudaSharedMemoryUnregister"));
  }
  // Called when the last of the regions, and this function, have let go of it.
  on_release.reset(static_cast<void*>(nullptr),
                   [ids, released = std::move(released)](void*) { released(*ids); });
  for (auto it = regions_.begin(); it != regions_.end();) {
    if (it->second->info().kind != kind || (!name.empty() && it->first != name)) {
      ++it;
      continue;
    }
    total_bytes_ -= it->second->info().size_bytes;
    ids->push_back(it->second->info().id);
    it->second->released_ = on_release;
    taken.push_back(std::move(it->second));
    it = regions_.erase(it);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const ShmRegion>> ShmRegistry::Find(std::string_view name) const {
  EPS_RETURN_IF_ERROR(CheckAllowed());
  absl::MutexLock lock(&mutex_);
  const auto it = regions_.find(name);
  if (it == regions_.end() || it->second->pending_) {
    return absl::NotFoundError(
        absl::StrCat("shared memory: region ", Quoted(name), " is not registered"));
  }
  return it->second;
}

absl::StatusOr<runtime::UniqueFd> ShmRegistry::DuplicateDescriptor(std::uint64_t id) const {
  std::shared_ptr<const ShmRegion> region;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = alive_.find(id);
    if (it != alive_.end()) region = it->second.lock();
  }
  if (region != nullptr) return region->DuplicateDescriptor();
  return absl::NotFoundError(absl::StrCat("shared memory: there is no region of number ", id));
}

absl::StatusOr<std::vector<ShmRegionInfo>> ShmRegistry::List(ShmKind kind,
                                                             std::string_view name) const {
  EPS_RETURN_IF_ERROR(CheckAllowed());
  absl::MutexLock lock(&mutex_);
  std::vector<ShmRegionInfo> result;
  for (const auto& [region_name, region] : regions_) {
    if (region->info().kind != kind || region->pending_) continue;
    if (name.empty() || region_name == name) result.push_back(region->info());
  }
  if (!name.empty() && result.empty()) {
    return absl::NotFoundError(
        absl::StrCat("shared memory: region ", Quoted(name), " is not registered"));
  }
  return result;
}

}  // namespace epserve::coordinator
