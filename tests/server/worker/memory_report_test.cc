#include "server/worker/memory_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/server/worker/fake_engine.h"

namespace epserve::worker {
namespace {

using testing::HasSubstr;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

class MemoryReportTest : public testing::Test {
 protected:
  MemoryReportTest() {
    std::string name = std::filesystem::temp_directory_path() / "epserve-memory-XXXXXX";
    root_ = mkdtemp(name.data());
    Write("/proc/meminfo", "MemTotal:  999999 kB\nMemAvailable:  8192 kB\n");
  }
  ~MemoryReportTest() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

TEST_F(MemoryReportTest, WithoutControlGroupsMemAvailableCounts) {
  const auto available = ReadAvailableMemory(root_, root_);
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_EQ(available->memory_bytes, 8 * kMiB);
  EXPECT_EQ(available->memory_limit, "MemAvailable");
  EXPECT_GT(available->shm_bytes, 0u);
}

TEST_F(MemoryReportTest, TightestControlGroupOnTheWayUpCountsLessItsPageCache) {
  Write("/proc/self/cgroup", "0::/a/b\n");
  Write("/sys/fs/cgroup/a/b/memory.max", "max\n");
  Write("/sys/fs/cgroup/a/b/memory.current", "100\n");
  Write("/sys/fs/cgroup/a/memory.max", std::to_string(6 * kMiB));
  Write("/sys/fs/cgroup/a/memory.current", std::to_string(5 * kMiB));
  Write("/sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 1048576\nactive_file 1048576\n");
  const auto available = ReadAvailableMemory(root_, root_);
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_EQ(available->memory_bytes, 3 * kMiB);
  EXPECT_THAT(available->memory_limit, HasSubstr("/a"));
}

TEST_F(MemoryReportTest, ControlGroupsOfVersion1CountToo) {
  Write("/proc/self/cgroup", "12:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/elsewhere\n");
  Write("/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
  Write("/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "100\n");
  Write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", std::to_string(6 * kMiB));
  Write("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", std::to_string(5 * kMiB));
  Write("/sys/fs/cgroup/memory/a/memory.stat",
        "inactive_file 1\ntotal_inactive_file 1048576\ntotal_active_file 1048576\n");
  const auto available = ReadAvailableMemory(root_, root_);
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_EQ(available->memory_bytes, 3 * kMiB);
  EXPECT_EQ(available->memory_limit, "memory.limit_in_bytes of control group /a");
}

// Its path is the host's, and only its own group is mounted there.
TEST_F(MemoryReportTest, ContainerOfVersion1SeesItsOwnGroupAtTheMount) {
  Write("/proc/self/cgroup", "4:memory:/docker/0123\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(2 * kMiB));
  Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(kMiB));
  const auto available = ReadAvailableMemory(root_, root_);
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_EQ(available->memory_bytes, kMiB);
}

TEST_F(MemoryReportTest, WhatTheEngineHoldsIsAvailableToIt) {
  FakeEngine engine;
  engine.set_held_host_bytes(3 * kMiB);
  const auto available = ReadMemoryFor(engine, root_, root_);
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_EQ(available->memory_bytes, 11 * kMiB);
}

TEST_F(MemoryReportTest, MissingMeminfoNamesTheFile) {
  const auto available = ReadAvailableMemory(root_ + "/none", root_);
  EXPECT_EQ(available.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(available.status().message()), HasSubstr("/proc/meminfo"));
}

TEST_F(MemoryReportTest, MissingSharedMemoryFolderIsNamed) {
  const auto available = ReadAvailableMemory(root_, root_ + "/shm");
  EXPECT_THAT(std::string(available.status().message()), HasSubstr("/shm"));
}

TEST(CheckMemoryFitsTest, WhatFitsExactlyIsTaken) {
  const runtime::MemoryPlan plan{.weight_bytes = 5, .heap_bytes = 3, .workspace_bytes = 2};
  EXPECT_TRUE(
      CheckMemoryFits(plan, {.memory_bytes = 10, .memory_limit = "x", .shm_bytes = 3}).ok());
}

TEST(CheckMemoryFitsTest, SaysByHowMuchItDoesNotFit) {
  const runtime::MemoryPlan plan{
      .weight_bytes = 5 * kMiB, .heap_bytes = 3 * kMiB, .workspace_bytes = 2 * kMiB};
  const absl::Status memory = CheckMemoryFits(
      plan, {.memory_bytes = 6 * kMiB, .memory_limit = "x", .shm_bytes = kMiB << 9});
  EXPECT_EQ(memory.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(memory.message()), HasSubstr("needs 10.0 MiB, 4.00 MiB more than"));
  const absl::Status shm =
      CheckMemoryFits(plan, {.memory_bytes = kMiB << 9, .memory_limit = "x", .shm_bytes = kMiB});
  EXPECT_EQ(shm.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(shm.message()), HasSubstr("heap needs 3.00 MiB, 2.00 MiB more than"));
}

TEST(MemoryTableTest, NamesEveryPartAndTheTotal) {
  const std::string table = MemoryTable(
      {.weight_bytes = 5 * kMiB,
       .heap_bytes = 3 * kMiB,
       .workspace_bytes = 512,
       .held_type = "bf16"},
      {.memory_bytes = 64 * kMiB, .memory_limit = "MemAvailable", .shm_bytes = 32 * kMiB});
  for (const char* text : {"weights", "5.00 MiB", "held as bf16", "heap", "3.00 MiB", "workspace",
                           "512 B", "total", "8.00 MiB", "64.0 MiB available (MemAvailable)"}) {
    EXPECT_THAT(table, HasSubstr(text));
  }
}

TEST(ResidentBytesTest, OfThisProcessIsPlausible) { EXPECT_GT(ResidentBytes(), kMiB); }

}  // namespace
}  // namespace epserve::worker
