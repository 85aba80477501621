// What a file that cannot be opened is told apart by: one that is there is never taken for one that
// is not.
#include "runtime/checkpoint/input_file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/checkpoint/checkpoint.h"
#include "tests/support/checkpoint_writer.h"

namespace epserve::runtime {
namespace {

namespace fs = std::filesystem;
using ::epserve::testing::TempDirectory;
using ::epserve::testing::WriteCheckpoint;
using ::epserve::testing::WriteFileBytes;
using ::testing::HasSubstr;

// Root reads whatever its mode says, so it looks as somebody else for as long as this lives.
class AsOrdinaryUser {
 public:
  AsOrdinaryUser() {
    if (::geteuid() == 0) changed_ = ::seteuid(kNobody) == 0;
  }
  ~AsOrdinaryUser() {
    if (!changed_) return;
    EXPECT_EQ(::seteuid(0), 0);
    // The change has taken it away, and LeakSanitizer looks at the process as a debugger does.
    EXPECT_EQ(::prctl(PR_SET_DUMPABLE, 1), 0);
  }

 private:
  static constexpr uid_t kNobody = 65534;
  bool changed_ = false;
};

// As long as this lives no file descriptor is left.
class NoDescriptors {
 public:
  NoDescriptors() {
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &before_), 0);
    const int lowest_free = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    ::close(lowest_free);
    rlimit none = before_;
    none.rlim_cur = static_cast<rlim_t>(lowest_free);
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  }
  ~NoDescriptors() { EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before_), 0); }

 private:
  rlimit before_ = {};
};

class InputFileTest : public ::testing::Test {
 protected:
  InputFileTest() { fs::permissions(directory_.path(), fs::perms(0755)); }

  std::string path() const { return directory_.path().string(); }
  absl::Status OpenFails(const std::string& directory, const std::string& name) {
    const auto file = InputFile::Open(directory, name);
    return file.status();
  }

  TempDirectory directory_;
};

TEST_F(InputFileTest, MissingFileOrDirectoryIsNotFound) {
  WriteFileBytes(directory_.path() / "file", "text");
  EXPECT_TRUE(absl::IsNotFound(OpenFails(path(), "other")));
  EXPECT_TRUE(absl::IsNotFound(OpenFails(path() + "/missing", "file")));
  EXPECT_TRUE(absl::IsNotFound(OpenFails(path() + "/file", "file")));
}

TEST_F(InputFileTest, FileThatMayNotBeReadIsPermissionDeniedForThatUser) {
  WriteFileBytes(directory_.path() / "file", "text");
  fs::permissions(directory_.path() / "file", fs::perms::none);
  const AsOrdinaryUser user;
  const absl::Status status = OpenFails(path(), "file");
  EXPECT_TRUE(absl::IsPermissionDenied(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(path() + "/file"));
  EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("by uid ", ::geteuid())));
}

TEST_F(InputFileTest, FileBehindADirectoryThatMayNotBeSearchedIsPermissionDenied) {
  fs::create_directory(directory_.path() / "shut");
  WriteFileBytes(directory_.path() / "shut/file", "text");
  fs::permissions(directory_.path() / "shut", fs::perms::none);
  {
    const AsOrdinaryUser user;
    EXPECT_TRUE(absl::IsPermissionDenied(OpenFails(path() + "/shut", "file")));
    EXPECT_TRUE(absl::IsPermissionDenied(OpenFails(path() + "/shut/model", "file")));
  }
  fs::permissions(directory_.path() / "shut", fs::perms::owner_all);
}

TEST_F(InputFileTest, NoDescriptorLeftIsResourceExhaustedAndSaysWhatToRaise) {
  WriteFileBytes(directory_.path() / "file", "text");
  std::optional<NoDescriptors> none(std::in_place);
  const absl::Status status = OpenFails(path(), "file");
  none.reset();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("ulimit -n"));
}

TEST_F(InputFileTest, LinkToItselfIsFailedPrecondition) {
  fs::create_symlink("loop", directory_.path() / "loop");
  const absl::Status status = OpenFails(path(), "loop");
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
}

TEST_F(InputFileTest, UnreadableSingleFileIsNotPassedOverForTheIndexBesideIt) {
  const fs::path model = directory_.path() / "model";
  WriteCheckpoint(model, {.shards = 2});
  ASSERT_TRUE(ReadModelInfo(model.string()).ok());
  WriteFileBytes(model / "model.safetensors", "what was to be served");
  fs::permissions(model / "model.safetensors", fs::perms::none);
  const AsOrdinaryUser user;
  const auto info = ReadModelInfo(model.string());
  EXPECT_TRUE(absl::IsPermissionDenied(info.status())) << info.status();
  EXPECT_THAT(std::string(info.status().message()), HasSubstr("model/model.safetensors"));
}

}  // namespace
}  // namespace epserve::runtime
