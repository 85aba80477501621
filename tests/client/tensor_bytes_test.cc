#include "client/cpp/tensor_bytes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace epserve::client {
namespace {

TensorBytes Filled(std::size_t size, char value) {
  TensorMemory memory(size);
  std::fill_n(memory.data(), size, value);
  return memory;
}

TEST(TensorBytesTest, StringIsTakenAsItIs) {
  std::string text(1000, 't');
  const char* const at = text.data();
  const TensorBytes bytes = std::move(text);
  EXPECT_EQ(bytes.data(), at);
  EXPECT_EQ(std::string_view(bytes), std::string(1000, 't'));
  EXPECT_EQ(std::string_view(TensorBytes(std::string("short"))), "short");
  EXPECT_TRUE(TensorBytes(std::string()).empty());
  EXPECT_TRUE(TensorBytes().empty());
}

TEST(TensorBytesTest, CopiesShareWhatTheyHoldAndOutliveEachOther) {
  TensorBytes first = Filled(100, 'a');
  const TensorBytes second = first;
  EXPECT_EQ(first.data(), second.data());
  first = std::string("other");
  EXPECT_EQ(std::string_view(second), std::string(100, 'a'));
  TensorBytes third = second;
  const TensorBytes fourth = std::move(third);
  EXPECT_EQ(fourth.data(), second.data());
  EXPECT_TRUE(third.empty());  // NOLINT(bugprone-use-after-move): empty, as the header says.
}

TEST(TensorBytesTest, EqualBytesAreEqualWhereverTheyLie) {
  EXPECT_EQ(Filled(10, 'a'), TensorBytes(std::string(10, 'a')));
  EXPECT_NE(Filled(10, 'a'), Filled(9, 'a'));
  EXPECT_NE(Filled(10, 'a'), Filled(10, 'b'));
  EXPECT_EQ(Filled(0, 'a'), TensorBytes());
}

TEST(TensorMemoryTest, LargeMemoryBeginsAtAHugePage) {
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  for (const std::size_t size : {kHugePage, 2 * kHugePage + 1}) {
    TensorMemory memory(size);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % kHugePage, 0u);
    std::memset(memory.data(), 'x', size);
    EXPECT_EQ(memory.size(), size);
  }
}

TEST(TensorMemoryTest, SpareMemoryOfOneHolderIsUsedAgainWhereItIsLargeEnough) {
  for (const std::size_t size : {std::size_t{100}, std::size_t{3} << 20}) {
    TensorBytes spare = Filled(size, 'a');
    const char* const at = spare.data();
    TensorMemory smaller(size / 2, std::move(spare));
    EXPECT_EQ(smaller.data(), at);
    EXPECT_EQ(smaller.size(), size / 2);
    TensorMemory whole(size, std::move(smaller));
    EXPECT_EQ(whole.data(), at);
    std::memset(whole.data(), 'b', size);
    TensorMemory larger(size + 1, std::move(whole));
    std::memset(larger.data(), 'c', size + 1);
    EXPECT_EQ(larger.size(), size + 1);
  }
}

TEST(TensorMemoryTest, SpareMemoryThatAnotherHoldsIsLeftAlone) {
  TensorBytes spare = Filled(100, 'a');
  const TensorBytes held = spare;
  TensorMemory memory(100, std::move(spare));
  EXPECT_NE(memory.data(), held.data());
  std::memset(memory.data(), 'b', memory.size());
  EXPECT_EQ(std::string_view(held), std::string(100, 'a'));
}

// What another thread has read is read before the memory is written again. (Shown by TSan.)
TEST(TensorMemoryTest, MemoryIsUsedAgainOnlyAfterItsOtherReaders) {
  for (int round = 0; round < 200; ++round) {
    TensorBytes bytes = Filled(64, 'a');
    std::atomic<int> wrong{0};
    std::thread reader([&wrong, copy = bytes]() mutable {
      for (const char value : std::string_view(copy)) wrong += value != 'a';
      copy = TensorBytes();
    });
    // Where the reader still holds it, this is other memory.
    TensorMemory memory(64, std::move(bytes));
    std::memset(memory.data(), 'b', 64);
    reader.join();
    EXPECT_EQ(wrong, 0);
  }
}

}  // namespace
}  // namespace epserve::client
