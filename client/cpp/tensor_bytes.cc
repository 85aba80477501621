#include "client/cpp/tensor_bytes.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace epserve::client {

namespace {

// x86-64's and, with 4 KiB pages, AArch64's. Memory that holds none whole gains nothing.
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

}  // namespace

struct TensorBytes::InPieces {
  std::atomic<const char*> joined{nullptr};
  std::mutex mutex;
  std::shared_ptr<const Pieces> apart;  // Guarded by mutex; null once they are joined.
  TensorBytes memory;                   // Guarded by mutex: where they are joined, or will be.
};

struct TensorBytes::Block {
  std::atomic<int> holders{1};
  std::string text;       // its memory, where it came as a string
  char* pages = nullptr;  // its memory, where it is large
  char* data = nullptr;   // either of the two, or what follows this block
  std::size_t capacity = 0;
  std::unique_ptr<InPieces> in_pieces;  // in place of all memory of its own

  static Block* Allocate(std::size_t size_bytes) {
    if (size_bytes < kHugePageBytes) {
      auto* const block = new (::operator new(sizeof(Block) + size_bytes)) Block;
      block->data = reinterpret_cast<char*>(block + 1);
      block->capacity = size_bytes;
      return block;
    }
    void* pages = nullptr;
    if (::posix_memalign(&pages, kHugePageBytes, size_bytes) != 0) throw std::bad_alloc();
    // The last, partial one stays of small pages: nothing is held that is not asked for. Where the
    // system has no huge pages, this fails and nothing is lost.
    (void)::madvise(pages, size_bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
    auto* const block = new (::operator new(sizeof(Block))) Block;
    block->pages = static_cast<char*>(pages);
    block->data = block->pages;
    block->capacity = size_bytes;
    return block;
  }

  void Hold() { holders.fetch_add(1, std::memory_order_relaxed); }
  void Drop() {
    // Release: what this holder has read, it has read before another writes there or frees it;
    // acquire: the last one comes after all of them.
    if (holders.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    std::free(pages);
    this->~Block();
    ::operator delete(this);
  }
  // Pairs with the release of those that have dropped it.
  bool HasOneHolder() const { return holders.load(std::memory_order_acquire) == 1; }
};

TensorBytes::TensorBytes(std::string text) {
  if (text.empty()) return;
  block_ = new (::operator new(sizeof(Block))) Block;
  block_->text = std::move(text);
  block_->data = block_->text.data();
  block_->capacity = block_->text.size();
  data_ = block_->data;
  size_ = block_->capacity;
}

TensorBytes::TensorBytes(std::vector<std::string_view> pieces, std::shared_ptr<const void> owner,
                         TensorBytes spare) {
  for (const std::string_view piece : pieces) size_ += piece.size();
  if (size_ == 0) return;
  block_ = new (::operator new(sizeof(Block))) Block;
  block_->in_pieces = std::make_unique<InPieces>();
  block_->in_pieces->apart =
      std::make_shared<const Pieces>(Pieces{std::move(pieces), std::move(owner)});
  block_->in_pieces->memory = SpareOf(std::move(spare));
}

TensorBytes::TensorBytes(TensorMemory&& memory) : TensorBytes(std::move(memory.bytes_)) {}

TensorBytes::TensorBytes(const TensorBytes& other) noexcept
    : block_(other.block_), data_(other.data_), size_(other.size_) {
  if (block_ != nullptr) block_->Hold();
}

TensorBytes::~TensorBytes() {
  if (block_ != nullptr) block_->Drop();
}

const char* TensorBytes::Joined() const {
  InPieces& in_pieces = *block_->in_pieces;
  // Acquire: pairs with the release below, after all has been copied.
  if (const char* const joined = in_pieces.joined.load(std::memory_order_acquire)) return joined;
  const std::lock_guard lock(in_pieces.mutex);
  if (in_pieces.apart == nullptr) return in_pieces.joined.load(std::memory_order_relaxed);
  TensorMemory memory(size_, std::move(in_pieces.memory));
  char* to = memory.data();
  for (const std::string_view piece : in_pieces.apart->all) {
    std::memcpy(to, piece.data(), piece.size());
    to += piece.size();
  }
  in_pieces.memory = std::move(memory);
  in_pieces.apart = nullptr;
  const char* const joined = in_pieces.memory.data_;
  in_pieces.joined.store(joined, std::memory_order_release);
  return joined;
}

std::shared_ptr<const TensorBytes::Pieces> TensorBytes::Apart() const {
  if (data_ != nullptr || size_ == 0) return nullptr;
  const std::lock_guard lock(block_->in_pieces->mutex);
  return block_->in_pieces->apart;
}

TensorBytes SpareOf(TensorBytes bytes) {
  const bool in_pieces = bytes.block_ != nullptr && bytes.block_->in_pieces != nullptr;
  return in_pieces ? TensorBytes(TensorMemory(0, std::move(bytes))) : bytes;
}

TensorMemory::TensorMemory(std::size_t size_bytes) : TensorMemory(size_bytes, TensorBytes()) {}

TensorMemory::TensorMemory(std::size_t size_bytes, TensorBytes&& spare) : bytes_(std::move(spare)) {
  if (bytes_.block_ != nullptr && bytes_.block_->in_pieces != nullptr) {
    const bool alone = bytes_.block_->HasOneHolder();
    bytes_ = alone ? std::move(bytes_.block_->in_pieces->memory) : TensorBytes();
  }
  TensorBytes::Block* const block = bytes_.block_;
  const bool fits = block != nullptr && block->capacity >= size_bytes && block->HasOneHolder();
  if (!fits) {
    bytes_ = TensorBytes();
    if (size_bytes > 0) bytes_.block_ = TensorBytes::Block::Allocate(size_bytes);
  }
  bytes_.data_ = bytes_.block_ != nullptr ? bytes_.block_->data : nullptr;
  bytes_.size_ = size_bytes;
}

}  // namespace epserve::client
