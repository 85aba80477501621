#include "runtime/base/id.h"

#include <gtest/gtest.h>

#include <string>

namespace epserve::runtime {
namespace {

TEST(IdTest, LettersDigitsAndThreeSignsMayBeInOneAndNothingElse) {
  const std::string allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-";
  for (int c = 0; c < 256; ++c) {
    const char as_char = static_cast<char>(c);
    EXPECT_EQ(IsId(std::string("a") + as_char), allowed.find(as_char) != std::string::npos) << c;
  }
}

TEST(IdTest, LengthIsOneTo64Bytes) {
  EXPECT_FALSE(IsId(""));
  EXPECT_TRUE(IsId("a"));
  EXPECT_TRUE(IsId(std::string(64, 'a')));
  EXPECT_FALSE(IsId(std::string(65, 'a')));
}

}  // namespace
}  // namespace epserve::runtime
