#include "server/coordinator/row_copier.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace epserve::coordinator {
namespace {

// Pieces of random sizes, of so many bytes in all, that leave gaps between them where they go.
void ExpectCopies(RowCopier& copier, std::size_t num_bytes, std::size_t max_piece_bytes) {
  static const std::string source = [] {
    std::string bytes(std::size_t{21} << 20, '\0');
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * i >> 7);
    return bytes;
  }();
  std::mt19937 random(7 + static_cast<unsigned>(num_bytes));
  const std::size_t begin = random() % 1000;
  const std::string_view from(source.data() + begin, num_bytes);
  std::vector<RowCopier::Piece> pieces;
  std::string expected;
  for (std::size_t at = 0; at < num_bytes;) {
    const std::size_t bytes = std::min(num_bytes - at, 1 + random() % max_piece_bytes);
    pieces.push_back({from.data() + at, nullptr, bytes});
    expected.append(from.substr(at, bytes));
    expected.push_back('|');
    at += bytes;
  }
  std::string to(expected.size(), '|');
  char* next = to.data();
  for (RowCopier::Piece& piece : pieces) {
    piece.to = next;
    next += piece.bytes + 1;
  }
  copier.Copy(pieces);
  EXPECT_TRUE(to == expected) << num_bytes << " bytes";
}

TEST(RowCopierTest, EveryByteIsCopiedWhoeverHelps) {
  for (const int num_helpers : {0, 1, 3}) {
    RowCopier copier(num_helpers);
    for (const std::size_t megabytes : {1, 5, 20}) {
      ExpectCopies(copier, (megabytes << 20) + 13, 100'000);
      ExpectCopies(copier, (megabytes << 20) + 13, std::size_t{4} << 20);
    }
  }
}

TEST(RowCopierTest, LateHelpersDisturbNoLaterCall) {
  RowCopier copier(3);
  for (int i = 0; i < 40; ++i) {
    // Helped, so that they are awake when the short ones come, which are not.
    ExpectCopies(copier, std::size_t{4} << 20, std::size_t{1} << 20);
    for (const std::size_t bytes : {1, 1000, 5000}) ExpectCopies(copier, bytes, 100);
  }
}

TEST(RowCopierTest, NothingIsCopiedWhereThereIsNothing) {
  RowCopier copier(1);
  copier.Copy({});
  const RowCopier::Piece none[] = {{nullptr, nullptr, 0}};
  copier.Copy(none);
}

TEST(RowCopierTest, HelpersAreNoMoreThanTheMachineHasCoresFor) {
  EXPECT_GE(RowCopier::HelpersHere(), 0);
  EXPECT_LE(RowCopier::HelpersHere(), 3);
}

}  // namespace
}  // namespace epserve::coordinator
