// The output rows of one request, on their way into its reply: written once, never copied again.
// Move-only.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_

#include <grpcpp/support/slice.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <span>
#include <utility>

namespace epserve::coordinator {

class OutputBytes {
 public:
  OutputBytes() = default;
  // Not initialised.
  explicit OutputBytes(std::size_t size) : data_(Allocate(size)), size_(size) {}
  OutputBytes(OutputBytes&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  OutputBytes& operator=(OutputBytes&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  std::size_t size() const { return size_; }
  std::span<char> bytes() { return {data_.get(), size_}; }
  std::span<const char> bytes() const { return {data_.get(), size_}; }

  // The bytes as gRPC sends them; it frees them. Nothing is left here.
  grpc::Slice Release() {
    char* const data = data_.release();
    return grpc::Slice(
        data, std::exchange(size_, 0), [](void* owned) { std::free(owned); }, data);
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  // The kernel hands out memory that is written for the first time page by page; that took as long
  // as the copying. Large outputs ask for large pages, of which a prefill batch takes 28.
  static constexpr std::size_t kLargePage = std::size_t{2} << 20;

  static char* Allocate(std::size_t size) {
    void* data = nullptr;
    if (size < 2 * kLargePage) {
      data = std::malloc(std::max<std::size_t>(size, 1));
    } else {
      data = std::aligned_alloc(kLargePage, (size + kLargePage - 1) / kLargePage * kLargePage);
      // Where the system has none to give, ordinary ones do.
      if (data != nullptr) (void)::madvise(data, size, MADV_HUGEPAGE);
    }
    if (data == nullptr) std::abort();  // As new would end the process.
    return static_cast<char*>(data);
  }

  std::unique_ptr<char[], Free> data_;
  std::size_t size_ = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_
