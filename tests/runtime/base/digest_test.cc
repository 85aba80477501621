#include "runtime/base/digest.h"

#include <gtest/gtest.h>

namespace epserve::runtime {
namespace {

TEST(DigestTest, IsFnv1aOfTheBytes) {
  EXPECT_EQ(Digest().value(), 0xcbf29ce484222325u);
  // The published value of "a", and what the end of a text makes of it.
  EXPECT_EQ(Digest().AddText("a").value(), (0xaf63dc4c8601ec8cu ^ 0xffu) * 0x100000001b3u);
  EXPECT_EQ(Digest().Add(0x0706050403020100).AddText("").value(),
            Digest().AddText({"\0\1\2\3\4\5\6\7", 8}).value());
}

TEST(DigestTest, TextsAreToldApartByWhereTheyEnd) {
  EXPECT_NE(Digest().AddText("ab").AddText("c").value(),
            Digest().AddText("a").AddText("bc").value());
  EXPECT_NE(Digest().Add(1).Add(2).value(), Digest().Add(2).Add(1).value());
}

}  // namespace
}  // namespace epserve::runtime
