#include "runtime/alltoallv/nccl_api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

TEST(NcclApiTest, MissingLibraryIsNamedWithItsRemedy) {
  const absl::Status status = OpenNcclLibrary("libnccl-of-nobody.so.2").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("libnccl-of-nobody.so.2"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("install libnccl2"));
}

TEST(NcclApiTest, LibraryWithoutTheFunctionsIsNamedWithTheFirstMissing) {
  const absl::Status status = OpenNcclLibrary("libc.so.6").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("libc.so.6 has no ncclGetVersion"));
}

TEST(NcclApiTest, InstalledLibraryHasEveryFunction) {
  const auto api = LoadNcclApi();
  if (!api.ok()) GTEST_SKIP() << api.status();
  int version = 0;
  EXPECT_EQ((*api)->GetVersion(&version), ncclSuccess);
  EXPECT_GE(version, NCCL_VERSION(2, 18, 1));
  const absl::Status status = NcclStatus(**api, ncclInvalidArgument, "ncclSend", nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("ncclSend failed: invalid argument"));
}

}  // namespace
}  // namespace epserve::runtime
