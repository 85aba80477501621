#include "server/common/grpc_status.h"

#include <gtest/gtest.h>

#include <string>

#include "absl/status/status.h"

namespace epserve::server {
namespace {

TEST(GrpcStatusTest, OkIsOkBothWays) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
}

TEST(GrpcStatusTest, EveryCodeSurvivesTheWayThereAndBack) {
  for (int number = 1; number <= 16; ++number) {
    const absl::Status before(static_cast<absl::StatusCode>(number), "why");
    const grpc::Status sent = ToGrpcStatus(before);
    EXPECT_EQ(static_cast<int>(sent.error_code()), number);
    EXPECT_EQ(FromGrpcStatus(sent), before);
  }
}

TEST(GrpcStatusTest, EmptyMessageLeavesWithTheCodesName) {
  EXPECT_EQ(ToGrpcStatus(absl::Status(absl::StatusCode::kAborted, "")).error_message(), "ABORTED");
}

TEST(GrpcStatusTest, EmptyMessageArrivesWithTheCodesName) {
  EXPECT_EQ(FromGrpcStatus(grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "")).message(),
            "UNIMPLEMENTED");
}

TEST(GrpcStatusTest, UnknownNumberArrivesAsUnknownNamingIt) {
  const absl::Status status = FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(30), "x"));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnknown);
  EXPECT_EQ(status.message(), "status code 30: x");
}

TEST(GrpcStatusTest, LongMessageIsCutOnACharacterBoundary) {
  // Two bytes each, the first at an odd offset: the limit falls into the middle of one.
  std::string message = "x";
  while (message.size() < 10000) message += "\xc3\xa9";
  const std::string cut = ToGrpcStatus(absl::InternalError(message)).error_message();
  EXPECT_EQ(cut.size(), 4095u);
  EXPECT_EQ(cut.substr(cut.size() - 2), "\xc3\xa9");
}

}  // namespace
}  // namespace epserve::server
