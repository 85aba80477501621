#include "client/cpp/tensor_bytes.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace epserve::client {

namespace {

// x86-64's and, with 4 KiB pages, AArch64's. Memory that holds none whole gains nothing.
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

}  // namespace

struct TensorBytes::Block {
  std::atomic<int> holders{1};
  std::string text;       // its memory, where it came as a string
  char* pages = nullptr;  // its memory, where it is large
  char* data = nullptr;   // either of the two, or what follows this block
  std::size_t capacity = 0;

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

TensorBytes::TensorBytes(TensorMemory&& memory) : TensorBytes(std::move(memory.bytes_)) {}

TensorBytes::TensorBytes(const TensorBytes& other) noexcept
    : block_(other.block_), data_(other.data_), size_(other.size_) {
  if (block_ != nullptr) block_->Hold();
}

TensorBytes::~TensorBytes() {
  if (block_ != nullptr) block_->Drop();
}

TensorMemory::TensorMemory(std::size_t size_bytes) : TensorMemory(size_bytes, TensorBytes()) {}

TensorMemory::TensorMemory(std::size_t size_bytes, TensorBytes&& spare) : bytes_(std::move(spare)) {
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
