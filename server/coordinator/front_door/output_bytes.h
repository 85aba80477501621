// The output rows of one request, on their way into its reply: written once, never copied again.
// Move-only.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_

#include <grpcpp/support/slice.h>

#include <cstddef>
#include <memory>
#include <span>
#include <utility>

namespace epserve::coordinator {

class OutputBytes {
 public:
  OutputBytes() = default;
  // Not initialised.
  explicit OutputBytes(std::size_t size)
      : data_(std::make_unique_for_overwrite<char[]>(size)), size_(size) {}
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
        data, std::exchange(size_, 0), [](void* owned) { delete[] static_cast<char*>(owned); },
        data);
  }

 private:
  std::unique_ptr<char[]> data_;
  std::size_t size_ = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_OUTPUT_BYTES_H_
