// Memory that each of several threads sees at an address of its own, as processes would. So does
// ThreadSanitizer, which knows memory by its address: ranks' flags are mapped once a rank, and what
// they order would seem unordered if it were at one address for all.
#ifndef EPSERVE_TESTS_SUPPORT_MANY_MAPPINGS_H_
#define EPSERVE_TESTS_SUPPORT_MANY_MAPPINGS_H_

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <span>
#include <vector>

namespace epserve {

class ManyMappings {
 public:
  // With `content`, seen `count` times. Ends the test's process where the system refuses.
  ManyMappings(std::span<const std::byte> content, int count)
      : bytes_(std::max<std::size_t>(content.size(), 1)) {
    const int fd = ::memfd_create("epserve-test", MFD_CLOEXEC);
    if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes_)) != 0) std::abort();
    for (int i = 0; i < count; ++i) {
      void* at = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (at == MAP_FAILED) std::abort();
      views_.push_back(static_cast<std::byte*>(at));
    }
    ::close(fd);
    std::copy(content.begin(), content.end(), views_.front());
  }
  ~ManyMappings() {
    for (std::byte* view : views_) ::munmap(view, bytes_);
  }
  ManyMappings(const ManyMappings&) = delete;
  ManyMappings& operator=(const ManyMappings&) = delete;

  std::byte* view(std::size_t index) const { return views_[index]; }

 private:
  const std::size_t bytes_;
  std::vector<std::byte*> views_;
};

}  // namespace epserve

#endif  // EPSERVE_TESTS_SUPPORT_MANY_MAPPINGS_H_
