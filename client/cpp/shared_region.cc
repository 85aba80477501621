#include "client/cpp/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

absl::Status Failed(const char* call, std::uint64_t bytes, int error) {
  const std::string message =
      absl::StrCat("shared memory: ", call, " of ", bytes, " bytes failed: ", std::strerror(error));
  if (error == ENOSPC || error == ENOMEM || error == EFBIG) {
    return absl::ResourceExhaustedError(absl::StrCat(message, "; free some, or enlarge /dev/shm"));
  }
  return absl::InternalError(message);
}

// Each key is tried once; a taken one is another process's.
constexpr int kKeysTried = 16;

}  // namespace

absl::StatusOr<std::unique_ptr<SharedMemory>> SharedMemory::Create(std::uint64_t bytes,
                                                                   const std::string& key_prefix) {
  constexpr auto kMostBytes = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (bytes == 0 || bytes > kMostBytes || key_prefix.find('/') != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("shared memory: ", bytes, " bytes with key prefix '", key_prefix,
                     "' cannot be made; give at least 1 byte and a prefix without slashes"));
  }
  std::unique_ptr<SharedMemory> memory(new SharedMemory);
  std::random_device random;
  int fd = -1;
  for (int i = 0; i < kKeysTried && fd < 0; ++i) {
    const std::string key = absl::StrCat(key_prefix, ::getpid(), "-", absl::Hex(random()));
    fd = ::shm_open(absl::StrCat("/", key).c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0 && errno != EEXIST) break;
    if (fd < 0) continue;
    memory->key_ = key;
    memory->named_ = true;
  }
  if (fd < 0) return Failed("shm_open", bytes, errno);
  // Reserved now: touching a page that the file system has no room for would end the process.
  const int reserved = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  void* const mapped = reserved != 0
                           ? MAP_FAILED
                           : ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const int map_error = errno;
  ::close(fd);
  if (reserved != 0) return Failed("posix_fallocate", bytes, reserved);
  if (mapped == MAP_FAILED) return Failed("mmap", bytes, map_error);
  memory->bytes_ = {static_cast<std::byte*>(mapped), static_cast<std::size_t>(bytes)};
  return memory;
}

SharedMemory::~SharedMemory() {
  if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
  RemoveName();
}

void SharedMemory::RemoveName() {
  if (std::exchange(named_, false)) ::shm_unlink(absl::StrCat("/", key_).c_str());
}

SharedRegion::SharedRegion(InferenceClient* client, std::string name, absl::Duration timeout,
                           std::unique_ptr<SharedMemory> memory)
    : client_(client), name_(std::move(name)), timeout_(timeout), memory_(std::move(memory)) {}

absl::StatusOr<std::unique_ptr<SharedRegion>> SharedRegion::Create(
    InferenceClient* client, const std::string& name, std::uint64_t bytes,
    const SharedRegionOptions& options) {
  EPC_ASSIGN_OR_RETURN(std::unique_ptr<SharedMemory> memory,
                       SharedMemory::Create(bytes, options.key_prefix));
  EPC_RETURN_IF_ERROR(
      client->RegisterRegion({name, memory->key(), /*offset_bytes=*/0, bytes}, options.timeout));
  memory->RemoveName();
  return std::unique_ptr<SharedRegion>(
      new SharedRegion(client, name, options.timeout, std::move(memory)));
}

SharedRegion::~SharedRegion() {
  // An error changes nothing here: the service holds a descriptor of its own, not this memory's
  // name.
  if (registered_) (void)Unregister(timeout_);
}

absl::Status SharedRegion::Unregister(absl::Duration timeout) {
  if (!registered_) return absl::OkStatus();
  EPC_RETURN_IF_ERROR(client_->UnregisterRegion(name_, timeout));
  registered_ = false;
  return absl::OkStatus();
}

}  // namespace epserve::client
