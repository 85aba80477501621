#include "runtime/alltoallv/nccl_handle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

NcclHandle MakeHandle() {
  NcclHandle handle;
  handle.rank = 3;
  handle.epoch = 7'000'000'001;
  handle.settings_digest = 0xfeedfacecafebeef;
  for (std::size_t i = 0; i < handle.unique_id.size(); ++i) {
    handle.unique_id[i] = static_cast<char>(255 - i);
  }
  return handle;
}

void ExpectRefused(const absl::Status& status, const std::string& text) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

TEST(NcclHandleTest, DecodingGivesWhatWasEncoded) {
  const NcclHandle handle = MakeHandle();
  const auto decoded = DecodeNcclHandle(EncodeNcclHandle(handle));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->rank, handle.rank);
  EXPECT_EQ(decoded->epoch, handle.epoch);
  EXPECT_EQ(decoded->settings_digest, handle.settings_digest);
  EXPECT_EQ(decoded->unique_id, handle.unique_id);
}

TEST(NcclHandleTest, BytesOfAnotherKindAreRefused) {
  std::string encoded = EncodeNcclHandle(MakeHandle());
  ExpectRefused(DecodeNcclHandle(encoded + "x").status(), "size 161");
  ExpectRefused(DecodeNcclHandle("").status(), "size 0");
  encoded[0] ^= 1;
  ExpectRefused(DecodeNcclHandle(encoded).status(), "magic");
}

TEST(NcclHandleTest, HandleThatDoesNotFitIsRefusedByField) {
  const NcclHandle own = MakeHandle();
  EXPECT_TRUE(CheckNcclHandle(own, 3, own).ok());
  ExpectRefused(CheckNcclHandle(own, 2, own), "rank 3 is not the expected 2");
  NcclHandle other = own;
  other.epoch = 8;
  ExpectRefused(CheckNcclHandle(other, 3, own), "epoch 8");
  other = own;
  other.settings_digest = 9;
  ExpectRefused(CheckNcclHandle(other, 3, own), "settings_digest 9");
}

}  // namespace
}  // namespace epserve::runtime
