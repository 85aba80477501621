#include "client/cpp/retry.h"

#include "gtest/gtest.h"

namespace epserve::client {
namespace {

constexpr auto kUnavailable = absl::StatusCode::kUnavailable;
constexpr auto kExhausted = absl::StatusCode::kResourceExhausted;

TEST(RetryTest, NothingIsRetriedUnlessOptedInto) {
  EXPECT_FALSE(NextAttemptDelay(RetryPolicy(), 1, kUnavailable, std::nullopt, 0));
  EXPECT_FALSE(NextAttemptDelay(RetryPolicy(), 1, kExhausted, "5", 0));
}

TEST(RetryTest, AttemptsAreBounded) {
  const RetryPolicy policy{.max_attempts = 3};
  EXPECT_TRUE(NextAttemptDelay(policy, 1, kUnavailable, std::nullopt, 0));
  EXPECT_TRUE(NextAttemptDelay(policy, 2, kUnavailable, std::nullopt, 0));
  EXPECT_FALSE(NextAttemptDelay(policy, 3, kUnavailable, std::nullopt, 0));
}

TEST(RetryTest, BackoffDoublesUpToTheMaximumAndSpreads) {
  const RetryPolicy policy{.max_attempts = 100,
                           .initial_backoff = absl::Milliseconds(10),
                           .max_backoff = absl::Milliseconds(35)};
  EXPECT_EQ(NextAttemptDelay(policy, 1, kUnavailable, std::nullopt, 0), absl::Milliseconds(10));
  EXPECT_EQ(NextAttemptDelay(policy, 2, kUnavailable, std::nullopt, 0), absl::Milliseconds(20));
  EXPECT_EQ(NextAttemptDelay(policy, 3, kUnavailable, std::nullopt, 0), absl::Milliseconds(35));
  EXPECT_EQ(NextAttemptDelay(policy, 90, kUnavailable, std::nullopt, 0), absl::Milliseconds(35));
  EXPECT_EQ(NextAttemptDelay(policy, 2, kUnavailable, std::nullopt, 0.5), absl::Milliseconds(15));
}

TEST(RetryTest, PushbackDecidesWhereThereIsOne) {
  const RetryPolicy policy{.max_attempts = 2};
  EXPECT_EQ(NextAttemptDelay(policy, 1, kExhausted, "250", 0), absl::Milliseconds(250));
  EXPECT_EQ(NextAttemptDelay(policy, 1, kUnavailable, "0", 0), absl::ZeroDuration());
  EXPECT_FALSE(NextAttemptDelay(policy, 1, kExhausted, std::nullopt, 0));
}

TEST(RetryTest, NegativeOrMalformedPushbackMeansDoNotRetry) {
  const RetryPolicy policy{.max_attempts = 2};
  for (const char* pushback : {"-1", "", "soon", "1.5", "99999999999999999999"}) {
    EXPECT_FALSE(NextAttemptDelay(policy, 1, kUnavailable, pushback, 0)) << pushback;
  }
}

TEST(RetryTest, StatusHasThePushbackThatItWasGivenUnlessThatIsNever) {
  const absl::Status full = absl::ResourceExhaustedError("full");
  EXPECT_EQ(RetryPushback(WithPushback(full, "250")), absl::Milliseconds(250));
  EXPECT_EQ(RetryPushback(WithPushback(full, "-1")), std::nullopt);
  EXPECT_EQ(RetryPushback(WithPushback(full, std::nullopt)), std::nullopt);
  EXPECT_EQ(WithPushback(full, std::nullopt), full);
  EXPECT_EQ(RetryPushback(absl::OkStatus()), std::nullopt);
}

TEST(RetryTest, OtherCodesAreNotRetried) {
  const RetryPolicy policy{.max_attempts = 2};
  for (int code = 1; code <= 16; ++code) {
    const auto status_code = static_cast<absl::StatusCode>(code);
    if (status_code == kUnavailable || status_code == kExhausted) continue;
    EXPECT_FALSE(NextAttemptDelay(policy, 1, status_code, "1", 0)) << code;
  }
}

}  // namespace
}  // namespace epserve::client
