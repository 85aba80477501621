// The exchange between real processes, which share nothing but the heaps.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/symmetric/stale_heaps.h"
#include "tests/runtime/alltoallv/exchange_rank.h"
#include "tests/runtime/symmetric/child_process.h"

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

constexpr std::uint32_t kSeed = 12345;

// With counts that each rank computes from the whole batch, or that the ranks exchange.
class HostExchangeProcessTest : public testing::TestWithParam<const char*> {
 protected:
  void Start(int num_ranks, int timeout_ms) {
    std::string handles;
    for (int rank = 0; rank < num_ranks; ++rank) {
      children_.emplace_back(
          EXCHANGE_RANK,
          std::vector<std::string>{cluster_id_, absl::StrCat(rank), absl::StrCat(num_ranks),
                                   absl::StrCat(kSeed), absl::StrCat(timeout_ms), GetParam()});
      ASSERT_TRUE(children_.back().started());
    }
    for (ChildProcess& child : children_) absl::StrAppend(&handles, child.ReadLine(), " ");
    for (ChildProcess& child : children_) ASSERT_TRUE(child.WriteLine(handles));
    for (ChildProcess& child : children_) ASSERT_EQ(child.ReadLine(), "open");
  }

  int NumSegments() const {
    int count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(kShmDirectory)) {
      if (entry.path().filename().string().find(cluster_id_) != std::string::npos) ++count;
    }
    return count;
  }

  const std::string cluster_id_ = absl::StrCat("process-test-", ::getpid());
  std::vector<ChildProcess> children_;
};

TEST_P(HostExchangeProcessTest, ProcessesGiveTheReferencesBitsAndLeaveNothingBehind) {
  constexpr int kRanks = 5;
  Start(kRanks, 60'000);
  for (ChildProcess& child : children_) ASSERT_TRUE(child.WriteLine("go"));
  std::string out;
  for (ChildProcess& child : children_) out += FromHex(child.ReadLine());
  for (ChildProcess& child : children_) EXPECT_EQ(child.Wait(), 0);

  const ExchangeConfig config = ProcessTestConfig(cluster_id_, kRanks, 60'000);
  const std::vector<std::byte> expected =
      Reference(ProcessTestBatch(config, kSeed), config.placement);
  ASSERT_EQ(out.size(), expected.size());
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), expected.size()), 0);
  EXPECT_EQ(NumSegments(), 0);
}

TEST_P(HostExchangeProcessTest, KilledPeerIsNamedByThoseWhoWaitAndItsHeapIsReclaimed) {
  Start(3, 2000);  // Neither of the living is late by as much.
  children_[1].Kill();
  for (const int rank : {0, 2}) ASSERT_TRUE(children_[rank].WriteLine("go"));
  for (const int rank : {0, 2}) {
    const std::string line = children_[rank].ReadLine();
    const bool exchanged = GetParam() == std::string("exchanged");
    EXPECT_THAT(line, HasSubstr(exchanged ? "error DEADLINE_EXCEEDED: counts: rank "
                                          : "error DEADLINE_EXCEEDED: dispatch: rank "));
    EXPECT_THAT(line, HasSubstr("ms for rank 1 (epoch 1, slot 0, batch 1)"));
    EXPECT_EQ(children_[rank].Wait(), 1);
  }
  EXPECT_EQ(NumSegments(), 1);
  EXPECT_EQ(*ReclaimStaleHeaps(cluster_id_), 1);
  EXPECT_EQ(NumSegments(), 0);
}

INSTANTIATE_TEST_SUITE_P(Counts, HostExchangeProcessTest, testing::Values("computed", "exchanged"));

}  // namespace
}  // namespace epserve::runtime
