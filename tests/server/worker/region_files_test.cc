#include "server/worker/region_files.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/server/worker/region_server_fixture.h"

namespace epserve::worker {
namespace {

using testing::HasSubstr;

constexpr std::int64_t kRowBytes = 4;

absl::Status MayWrite() { return absl::OkStatus(); }

RegionRows Rows(std::uint64_t region, std::uint64_t offset, std::int64_t first, std::int64_t num) {
  return {region, absl::StrCat("'r", region, "'"), offset, first, num};
}

class RegionFilesTest : public testing::Test {
 protected:
  RegionFilesTest() : files_(RegionFiles::Connect(server_.address(), FakeRegionServer::kSecret)) {
    EXPECT_NE(files_, nullptr);
    server_.Add(1, "..aaaabbbbcccc");
    server_.Add(2, "ddddeeee");
  }

  std::vector<RegionFault> Read(const std::vector<RegionRows>& sources) {
    return files_->ReadRows(sources, kRowBytes, reinterpret_cast<std::byte*>(rows_.data()));
  }
  absl::Status Write(const std::vector<RegionRows>& targets, std::vector<RegionFault>& faults,
                     const std::function<absl::Status()>& may_write = MayWrite) {
    return files_->WriteRows(targets, kRowBytes, reinterpret_cast<std::byte*>(rows_.data()),
                             may_write, faults);
  }

  FakeRegionServer server_;
  std::shared_ptr<RegionFiles> files_;
  std::string rows_ = std::string(16, 'x');  // Four.
};

TEST_F(RegionFilesTest, NoAddressOrNobodyThereOrAWrongSecretIsNone) {
  EXPECT_EQ(RegionFiles::Connect("", ""), nullptr);
  EXPECT_EQ(RegionFiles::Connect("@epserve-nobody-listens-here", "secret"), nullptr);
  EXPECT_EQ(RegionFiles::Connect(server_.address(), "wrong"), nullptr);
}

TEST_F(RegionFilesTest, RowsOfSeveralRegionsGoToTheirPlaces) {
  EXPECT_TRUE(Read({Rows(1, 6, 0, 2), Rows(2, 4, 3, 1)}).empty());
  EXPECT_EQ(rows_, "bbbbccccxxxxeeee");
  rows_ = "1111222233334444";
  std::vector<RegionFault> faults;
  ASSERT_TRUE(Write({Rows(1, 2, 1, 2), Rows(2, 0, 0, 1)}, faults).ok());
  EXPECT_TRUE(faults.empty());
  EXPECT_EQ(server_.Content(1), "..22223333cccc");
  EXPECT_EQ(server_.Content(2), "1111eeee");
}

TEST_F(RegionFilesTest, DescriptorIsFetchedOnceAndKeptUntilForgotten) {
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(Read({Rows(1, 2, 0, 1)}).empty());
  EXPECT_EQ(server_.num_fetched, 1);
  EXPECT_EQ(files_->num_open(), 1u);
  const auto user = files_->Find(1).value();
  files_->Forget(std::vector<std::uint64_t>{1, 99});
  EXPECT_EQ(files_->num_open(), 0u);
  EXPECT_GE(::fcntl(user->get(), F_GETFD), 0) << "whoever uses it still can";
  EXPECT_TRUE(Read({Rows(1, 2, 0, 1)}).empty());
  EXPECT_EQ(server_.num_fetched, 2);
}

TEST_F(RegionFilesTest, RowsThatCannotBeReadBecomeZerosAndAFaultAndTheOthersAreRead) {
  server_.Truncate(1, 9);
  const auto faults = Read({Rows(1, 2, 0, 2), Rows(7, 0, 2, 1), Rows(2, 0, 3, 1)});
  EXPECT_EQ(rows_, std::string(12, '\0') + "dddd");
  ASSERT_EQ(faults.size(), 2u);
  EXPECT_EQ(faults[0].first_row, 0);
  EXPECT_EQ(faults[0].status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(faults[0].status.message()), HasSubstr("region 'r1' has been truncated"));
  EXPECT_EQ(faults[1].first_row, 2);
  EXPECT_EQ(faults[1].status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(faults[1].status.message()), HasSubstr("region 'r7'"));
}

TEST_F(RegionFilesTest, ObjectTruncatedIsNotWrittenAndDoesNotGrow) {
  server_.Truncate(1, 9);
  std::vector<RegionFault> faults;
  ASSERT_TRUE(Write({Rows(1, 2, 0, 2), Rows(2, 0, 2, 1)}, faults).ok());
  ASSERT_EQ(faults.size(), 1u);
  EXPECT_EQ(faults[0].first_row, 0);
  EXPECT_EQ(server_.Content(1), "..aaaabbb");
  EXPECT_EQ(server_.Content(2), "xxxxeeee");
}

TEST_F(RegionFilesTest, RowsThatCouldNotBeReadAreNotWritten) {
  std::vector<RegionFault> faults = {{0, absl::InternalError("not read")}};
  ASSERT_TRUE(Write({Rows(1, 2, 0, 1), Rows(2, 0, 1, 1)}, faults).ok());
  EXPECT_EQ(faults.size(), 1u);
  EXPECT_EQ(server_.Content(1), "..aaaabbbbcccc");
  EXPECT_EQ(server_.Content(2), "xxxxeeee");
}

TEST_F(RegionFilesTest, NothingMoreIsWrittenOnceItMayNotBe) {
  int asked = 0;
  const auto may_write = [&] {
    return ++asked == 1 ? absl::OkStatus() : absl::AbortedError("given up");
  };
  std::vector<RegionFault> faults;
  EXPECT_EQ(Write({Rows(1, 2, 0, 1), Rows(2, 0, 1, 1)}, faults, may_write).code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(server_.Content(1), "..xxxxbbbbcccc");
  EXPECT_EQ(server_.Content(2), "ddddeeee");
}

TEST_F(RegionFilesTest, ALargeWindowIsAskedForPieceByPiece) {
  constexpr std::int64_t kLargeRow = std::int64_t{1} << 20;
  rows_ = std::string(3 * kLargeRow, 'y');
  server_.Add(3, std::string(3 * kLargeRow, '.'));
  int asked = 0;
  const auto may_write = [&] {
    return ++asked <= 2 ? absl::OkStatus() : absl::AbortedError("now");
  };
  std::vector<RegionFault> faults;
  const std::vector<RegionRows> target = {Rows(3, 0, 0, 3)};
  EXPECT_FALSE(files_
                   ->WriteRows(target, kLargeRow, reinterpret_cast<std::byte*>(rows_.data()),
                               may_write, faults)
                   .ok());
  EXPECT_EQ(asked, 3);
}

}  // namespace
}  // namespace epserve::worker
