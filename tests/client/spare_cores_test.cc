#include "client/command/spare_cores.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <climits>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

class GrantedCoresTest : public testing::Test {
 protected:
  // In the group's directory below the root.
  void Write(const std::string& group, const std::string& file, const std::string& text) {
    const std::string directory = directory_.File("cgroup") + group;
    std::filesystem::create_directories(directory);
    std::ofstream(directory + "/" + file) << text;
  }
  int Granted(const std::string& membership) const {
    return GrantedCores(membership, directory_.File("cgroup"));
  }

  TestDirectory directory_;
};

TEST_F(GrantedCoresTest, GroupWithoutQuotaSetsNone) {
  EXPECT_EQ(Granted("0::/\n"), INT_MAX);
  EXPECT_EQ(Granted(""), INT_MAX);
  Write("/a", "cpu.max", "max 100000\n");
  EXPECT_EQ(Granted("0::/a\n"), INT_MAX);
}

TEST_F(GrantedCoresTest, QuotaOfTheGroupAndOfThoseAboveItBinds) {
  Write("/a/b", "cpu.max", "800000 100000\n");
  EXPECT_EQ(Granted("0::/a/b\n"), 8);
  Write("/a", "cpu.max", "350000 100000\n");
  EXPECT_EQ(Granted("0::/a/b\n"), 3) << "whole cores only";
  Write("", "cpu.max", "50000 100000\n");
  EXPECT_EQ(Granted("0::/a/b\n"), 1) << "of a container that sees its own group as the root";
  EXPECT_EQ(Granted("0::/\n"), 1);
  EXPECT_EQ(Granted("0::/elsewhere/of/the/host\n"), 1);
}

TEST_F(GrantedCoresTest, QuotaOfVersionOneBinds) {
  Write("/cpu/a", "cpu.cfs_quota_us", "400000\n");
  Write("/cpu/a", "cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Granted("5:memory:/m\n4:cpu,cpuacct:/a\n0::/\n"), 4);
  EXPECT_EQ(Granted("5:memory:/a\n4:cpuset:/a\n"), INT_MAX) << "not the groups of processor time";
  Write("/cpu/a", "cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(Granted("4:cpu,cpuacct:/a\n"), INT_MAX);
}

TEST_F(GrantedCoresTest, FilesThatSaySomethingElseSetNone) {
  Write("/a", "cpu.max", "many 100000\n");
  EXPECT_EQ(Granted("0::/a\n"), INT_MAX);
  Write("/a", "cpu.max", "400000 0\n");
  EXPECT_EQ(Granted("0::/a\n"), INT_MAX);
  Write("/a", "cpu.max", "400000\n");
  EXPECT_EQ(Granted("0::/a\nnonsense\n"), INT_MAX);
}

TEST(AvailableCoresTest, AreThoseThatTheProcessMayRunOn) {
  cpu_set_t before;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  EXPECT_GE(AvailableCores(), 1);
  EXPECT_LE(AvailableCores(), CPU_COUNT(&before));
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(AvailableCores(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
}

TEST(DefaultBusyPollTest, LooksOnlyWhereTwoCoresRemain) {
  EXPECT_EQ(LookingThreads(4, 2), 13);
  EXPECT_GT(DefaultBusyPollUs(16, LookingThreads(4, 2) + 1), 0);
  EXPECT_EQ(DefaultBusyPollUs(15, LookingThreads(4, 2) + 1), 0);
  EXPECT_EQ(DefaultBusyPollUs(2, LookingThreads(1, 1) + 1), 0);
}

}  // namespace
}  // namespace epserve::client
