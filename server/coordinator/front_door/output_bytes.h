// The output rows of one request, on their way into its reply: written once, never copied again; or
// where somebody else has them, and keeps them there until the caller has taken the reply.
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
  explicit OutputBytes(std::size_t size) : own_(Allocate(size)), rows_(own_.get(), size) {}
  // They stay as they are until `owner` goes.
  OutputBytes(std::span<const char> rows, std::shared_ptr<const void> owner)
      : owner_(std::move(owner)), rows_(rows) {}
  OutputBytes(OutputBytes&& other) noexcept
      : own_(std::move(other.own_)),
        owner_(std::move(other.owner_)),
        rows_(std::exchange(other.rows_, {})) {}
  OutputBytes& operator=(OutputBytes&& other) noexcept {
    own_ = std::move(other.own_);
    owner_ = std::move(other.owner_);
    rows_ = std::exchange(other.rows_, {});
    return *this;
  }

  std::size_t size() const { return rows_.size(); }
  std::span<const char> bytes() const { return rows_; }
  std::span<char> mutable_bytes() { return {own_.get(), rows_.size()}; }  // REQUIRES: its own

  // The bytes as gRPC sends them; it frees them, or lets go of their owner. Nothing is left here.
  grpc::Slice Release() {
    const std::span<const char> rows = std::exchange(rows_, {});
    // gRPC does not write to what it sends.
    char* const data = const_cast<char*>(rows.data());
    if (own_ != nullptr) {
      return grpc::Slice(
          data, rows.size(), [](void* owned) { std::free(owned); }, own_.release());
    }
    using Owner = std::shared_ptr<const void>;
    return grpc::Slice(
        data, rows.size(), [](void* owner) { delete static_cast<Owner*>(owner); },
        new Owner(std::move(owner_)));
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

  std::unique_ptr<char[], Free> own_;  // null where they are another's
  std::shared_ptr<const void> owner_;
  std::span<const char> rows_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_
