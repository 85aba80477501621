#include "client/cpp/tensor_bytes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
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

// Of "one", "two" and "three", with an owner that tells when it is let go.
struct Parted {
  std::shared_ptr<const std::string> text = std::make_shared<const std::string>("onetwothree");
  std::weak_ptr<const std::string> owner = text;

  TensorBytes Bytes(TensorBytes spare = {}) {
    const std::string_view all = *text;
    return TensorBytes({all.substr(0, 3), all.substr(3, 3), all.substr(6)}, std::move(text),
                       std::move(spare));
  }
};

std::vector<std::string_view> PiecesOf(const TensorBytes& bytes) {
  std::vector<std::string_view> pieces;
  bytes.ForEachPiece([&](std::string_view piece) { pieces.push_back(piece); });
  return pieces;
}

TEST(TensorBytesTest, PiecesAreGivenWhereTheyStand) {
  Parted parted;
  const char* const at = parted.text->data();
  const TensorBytes bytes = parted.Bytes();
  EXPECT_EQ(bytes.size(), 11u);
  const std::vector<std::string_view> pieces = PiecesOf(bytes);
  EXPECT_EQ(pieces, (std::vector<std::string_view>{"one", "two", "three"}));
  EXPECT_EQ(pieces[0].data(), at);
  EXPECT_EQ(pieces[2].data(), at + 6);
  EXPECT_FALSE(parted.owner.expired());

  EXPECT_EQ(PiecesOf(Filled(4, 'a')), std::vector<std::string_view>{"aaaa"});
  EXPECT_TRUE(PiecesOf(TensorBytes()).empty());
  EXPECT_TRUE(TensorBytes({}, nullptr, {}).empty());
  EXPECT_EQ(TensorBytes({}, nullptr, {}).data(), nullptr);
}

TEST(TensorBytesTest, PiecesAreJoinedOnceForAllHoldersAndLetGo) {
  Parted parted;
  TensorBytes first = parted.Bytes();
  const TensorBytes second = first;
  EXPECT_EQ(std::string_view(first), "onetwothree");
  EXPECT_EQ(second.data(), first.data());
  EXPECT_TRUE(parted.owner.expired());
  EXPECT_EQ(PiecesOf(second), std::vector<std::string_view>{"onetwothree"});
  first = TensorBytes();
  EXPECT_EQ(second, TensorBytes(std::string("onetwothree")));
}

TEST(TensorBytesTest, PiecesThatAreNotJoinedGoWithTheirLastHolder) {
  Parted parted;
  TensorBytes first = parted.Bytes();
  TensorBytes second = first;
  first = TensorBytes();
  EXPECT_FALSE(parted.owner.expired());
  second = TensorBytes();
  EXPECT_TRUE(parted.owner.expired());
}

TEST(TensorBytesTest, PiecesAreJoinedInTheSpareMemory) {
  TensorBytes spare = Filled(100, 's');
  const char* const at = spare.data();
  Parted parted;
  const TensorBytes bytes = parted.Bytes(std::move(spare));
  EXPECT_EQ(bytes.data(), at);
  EXPECT_EQ(std::string_view(bytes), "onetwothree");
}

TEST(TensorBytesTest, SpareMemoryOfPiecesIsWhatTheyWereToBeJoinedIn) {
  for (const bool joined : {false, true}) {
    TensorBytes spare = Filled(100, 's');
    const char* const at = spare.data();
    Parted parted;
    TensorBytes bytes = parted.Bytes(std::move(spare));
    if (joined) {
      EXPECT_EQ(bytes.data(), at);
    }
    bytes = SpareOf(std::move(bytes));
    EXPECT_TRUE(parted.owner.expired());
    TensorMemory memory(100, std::move(bytes));
    EXPECT_EQ(memory.data(), at);
  }
  // Memory that a holder of the pieces may yet read is nobody's.
  Parted parted;
  TensorBytes bytes = parted.Bytes(Filled(100, 's'));
  const TensorBytes held = bytes;
  TensorMemory memory(100, SpareOf(std::move(bytes)));
  std::memset(memory.data(), 'x', 100);
  EXPECT_EQ(std::string_view(held), "onetwothree");
  // Nor is there any without a spare.
  Parted bare;
  EXPECT_TRUE(SpareOf(bare.Bytes()).empty());
  EXPECT_TRUE(bare.owner.expired());
}

TEST(TensorBytesTest, SpareMemoryThatIsInOnePieceStaysWhatItIs) {
  const TensorBytes held = Filled(100, 'a');
  EXPECT_EQ(SpareOf(held).data(), held.data());
  EXPECT_TRUE(SpareOf(TensorBytes()).empty());
}

// Some read the pieces while others join them. (Data races are shown by TSan.)
TEST(TensorBytesTest, HoldersReadPiecesAndJoinThemAtTheSameTime) {
  for (int round = 0; round < 200; ++round) {
    Parted parted;
    TensorBytes bytes = parted.Bytes();
    std::atomic<int> wrong{0};
    std::vector<std::thread> readers;
    for (int reader = 0; reader < 4; ++reader) {
      readers.emplace_back([&wrong, reader, copy = bytes] {
        std::string text;
        if (reader % 2 == 0) {
          copy.ForEachPiece([&](std::string_view piece) { text += piece; });
        } else {
          text = std::string_view(copy);
        }
        wrong += text != "onetwothree";
      });
    }
    bytes = TensorBytes();
    for (std::thread& reader : readers) reader.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_TRUE(parted.owner.expired());
  }
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
