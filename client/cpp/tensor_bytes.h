// A tensor's bytes without copies: TensorMemory is written, TensorBytes is what has been written,
// which its copies share. A request's bytes are thus gRPC's too, for as long as it needs them, and
// a decode loop takes the last step's memory again:
//
//   TensorMemory memory(size_bytes, std::move(tensor.bytes));  // reused once nobody else reads it
//   Fill(memory.data());
//   tensor.bytes = std::move(memory);
//
// A large result stays in the pieces that it came in until somebody wants it in one: whoever copies
// it elsewhere anyway, as to a GPU or a file, takes the pieces and saves a copy of it all.
//
// Thread safety: holders of the same bytes may be used and dropped by different threads; one
// TensorBytes is like any value.
#ifndef EPSERVE_CLIENT_CPP_TENSOR_BYTES_H_
#define EPSERVE_CLIENT_CPP_TENSOR_BYTES_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace epserve::client {

class TensorMemory;

class TensorBytes {
 public:
  TensorBytes() = default;
  // Takes the string as it is. Conversions are wanted: whoever has a string or memory gives it.
  TensorBytes(std::string text);       // NOLINT(google-explicit-constructor)
  TensorBytes(TensorMemory&& memory);  // NOLINT(google-explicit-constructor)
  // Takes bytes in the pieces that they are in, which stay as they are until `owner` goes. They are
  // joined, if ever, in the memory of `spare` where TensorMemory would take that.
  TensorBytes(std::vector<std::string_view> pieces, std::shared_ptr<const void> owner,
              TensorBytes spare);
  TensorBytes(const TensorBytes& other) noexcept;
  TensorBytes(TensorBytes&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  TensorBytes& operator=(TensorBytes other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~TensorBytes();

  // In one piece. The first call joins what came in several, once for all holders.
  const char* data() const { return data_ != nullptr || size_ == 0 ? data_ : Joined(); }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  operator std::string_view() const { return {data(), size_}; }  // NOLINT(google-explicit-*)

  // Calls use(std::string_view) for what there is, one piece after another, without joining them.
  // A piece is not empty, and stays where it is until its use has returned.
  template <typename Use>
  void ForEachPiece(const Use& use) const {
    if (const std::shared_ptr<const Pieces> apart = Apart()) {
      for (const std::string_view piece : apart->all) use(piece);
    } else if (!empty()) {
      use(std::string_view(*this));
    }
  }

  friend bool operator==(const TensorBytes& a, const TensorBytes& b) {
    return std::string_view(a) == std::string_view(b);
  }

 private:
  friend class TensorMemory;
  friend TensorBytes SpareOf(TensorBytes bytes);
  struct Block;  // the memory and the count of its holders
  struct Pieces {
    std::vector<std::string_view> all;
    std::shared_ptr<const void> owner;
  };
  struct InPieces;  // what a block has of these

  const char* Joined() const;
  std::shared_ptr<const Pieces> Apart() const;  // null: the bytes are in one piece

  Block* block_ = nullptr;
  const char* data_ = nullptr;  // null where there are none, or they came in pieces
  std::size_t size_ = 0;
};

// What of `bytes` TensorMemory may take, and none of the pieces that they came in: of these nothing
// can be written again, and whoever keeps memory for later is not to keep them.
TensorBytes SpareOf(TensorBytes bytes);

// Memory for a tensor's bytes, of one owner. Large ones lie on huge pages where the system gives
// them to those who ask, so that 58 MB cost 28 page faults in place of 14,000.
class TensorMemory {
 public:
  // What is in it is undefined.
  explicit TensorMemory(std::size_t size_bytes);
  // In the memory of `spare`, if it is large enough and nobody else holds it; else as above.
  TensorMemory(std::size_t size_bytes, TensorBytes&& spare);
  TensorMemory(TensorMemory&&) noexcept = default;
  TensorMemory& operator=(TensorMemory&&) noexcept = default;

  char* data() { return const_cast<char*>(bytes_.data_); }  // Nobody else holds it.
  std::size_t size() const { return bytes_.size_; }

 private:
  friend class TensorBytes;
  TensorBytes bytes_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_TENSOR_BYTES_H_
