#include "server/rpc/half_messages.h"

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace epserve::server {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

// The reader of a connection with a call under way.
std::shared_ptr<HalfMessages::Reader> Call(HalfMessages& half, const std::string& peer) {
  auto reader = half.ReaderOf(peer);
  reader->OnCallBegins();
  return reader;
}

std::optional<HalfMessages::Holder> Look(HalfMessages& half,
                                         const std::vector<HalfMessages::Received>& connections,
                                         std::uint64_t max_bytes) {
  half.TakeReads();
  return half.Look(connections, max_bytes);
}

TEST(HalfMessagesTest, WhatWasReadIsNotHeld) {
  HalfMessages half;
  const auto reader = Call(half, "a");
  EXPECT_FALSE(Look(half, {{"a", 3 * kMiB}}, 10 * kMiB).has_value());
  EXPECT_EQ(half.held_bytes(), 3 * kMiB);
  reader->OnMessage(5 * kMiB);
  Look(half, {{"a", 5 * kMiB + 200}}, 10 * kMiB);
  EXPECT_EQ(half.held_bytes(), 0) << "headers and framing are allowed for";
}

TEST(HalfMessagesTest, WhoHoldsMostIsNamedOnceTheyHoldTooMuchTogether) {
  HalfMessages half;
  const auto a = Call(half, "a");
  const auto b = Call(half, "b");
  EXPECT_FALSE(Look(half, {{"a", 4 * kMiB}, {"b", 5 * kMiB}}, 10 * kMiB).has_value());
  const auto holder = Look(half, {{"a", 4 * kMiB}, {"b", 7 * kMiB}}, 10 * kMiB);
  ASSERT_TRUE(holder.has_value());
  EXPECT_EQ(holder->peer, "b");
  EXPECT_EQ(holder->num_bytes, 7 * kMiB);
  EXPECT_EQ(half.held_bytes(), 4 * kMiB);
  EXPECT_FALSE(Look(half, {{"a", 4 * kMiB}, {"b", 8 * kMiB}}, 10 * kMiB).has_value())
      << "it is being ended";
}

TEST(HalfMessagesTest, WhatAConnectionHeldGoesWithIt) {
  HalfMessages half;
  Call(half, "a");
  const auto b = Call(half, "b");
  Look(half, {{"a", 20 * kMiB}, {"b", 0}}, 30 * kMiB);
  EXPECT_FALSE(Look(half, {{"b", 1}}, 10 * kMiB).has_value());
  EXPECT_EQ(half.held_bytes(), 1);
  Call(half, "a");
  Look(half, {{"a", 7}, {"b", 1}}, 10 * kMiB);
  EXPECT_EQ(half.held_bytes(), 8) << "another connection of the same port";
}

TEST(HalfMessagesTest, ConnectionThatReplacesAnotherUnseenBeginsAnew) {
  HalfMessages half;
  Call(half, "a");
  Look(half, {{"a", 20 * kMiB}}, 30 * kMiB);
  Look(half, {{"a", 2 * kMiB}}, 30 * kMiB);
  EXPECT_EQ(half.held_bytes(), 2 * kMiB);
}

TEST(HalfMessagesTest, SmallMessagesAreNoCreditForALargeHalf) {
  HalfMessages half;
  const auto reader = Call(half, "a");
  std::uint64_t received = 0;
  for (int look = 0; look < 100; ++look) {
    for (int i = 0; i < 1000; ++i) reader->OnMessage(1);
    Look(half, {{"a", received += 100'000}}, 10 * kMiB);
    ASSERT_EQ(half.held_bytes(), 0);
  }
  EXPECT_TRUE(Look(half, {{"a", received + 11 * kMiB}}, 10 * kMiB).has_value());
}

TEST(HalfMessagesTest, ConnectionThatALookDidNotFindYetKeepsItsReader) {
  HalfMessages half;
  const auto old = Call(half, "old");
  const auto reader = Call(half, "new");
  Look(half, {{"old", 1}}, kMiB);
  reader->OnMessage(3 * kMiB);
  Look(half, {{"old", 1}, {"new", 3 * kMiB}}, kMiB);
  EXPECT_EQ(half.held_bytes(), 1);
}

TEST(HalfMessagesTest, WhatCameForNobodyCountsNotOnceNoCallIsUnderWay) {
  HalfMessages half;
  const auto reader = Call(half, "a");
  Look(half, {{"a", 20 * kMiB}}, 30 * kMiB);
  EXPECT_EQ(half.held_bytes(), 20 * kMiB);
  reader->OnCallEnds();  // Without its message: it was cancelled.
  Look(half, {{"a", 20 * kMiB}}, 30 * kMiB);
  EXPECT_EQ(half.held_bytes(), 0);
  Look(half, {{"a", 90 * kMiB}}, 30 * kMiB);  // Of calls that were refused.
  EXPECT_EQ(half.held_bytes(), 0);
  reader->OnCallBegins();
  Look(half, {{"a", 95 * kMiB}}, 30 * kMiB);
  EXPECT_EQ(half.held_bytes(), 5 * kMiB);
}

TEST(HalfMessagesTest, WhatIsReadDuringALookIsHeldNoLongerThanToTheNext) {
  HalfMessages half;
  const auto call = Call(half, "a");
  half.TakeReads();
  call->OnMessage(5 * kMiB);  // It came after that, too, and the socket knows of it.
  half.Look({{"a", 5 * kMiB}}, 10 * kMiB);
  EXPECT_EQ(half.held_bytes(), 5 * kMiB);
  Look(half, {{"a", 5 * kMiB}}, 10 * kMiB);
  EXPECT_EQ(half.held_bytes(), 0u);
}

TEST(HalfMessagesTest, CallsOfOneConnectionHaveOneReader) {
  HalfMessages half;
  EXPECT_EQ(half.ReaderOf("a"), half.ReaderOf("a"));
  EXPECT_NE(half.ReaderOf("a"), half.ReaderOf("b"));
}

}  // namespace
}  // namespace epserve::server
