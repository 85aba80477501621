#include "runtime/experts/team.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace epserve::runtime {
namespace {

// Each member writes its place, meets the others, then reads its neighbour's.
class RingJob : public Team::Job {
 public:
  RingJob(Team* team, int rounds) : team_(*team), rounds_(rounds), written_(team->size()) {}

  void RunMember(int member) override {
    for (int round = 1; round <= rounds_; ++round) {
      written_[static_cast<std::size_t>(member)] = round;
      team_.Barrier();
      const int neighbour = (member + 1) % team_.size();
      if (written_[static_cast<std::size_t>(neighbour)] != round) failed_ = true;
      team_.Barrier();
    }
  }
  bool failed() const { return failed_; }

 private:
  Team& team_;
  const int rounds_;
  std::vector<int> written_;
  std::atomic<bool> failed_ = false;  // by any member
};

TEST(TeamTest, MembersSeeEachOthersWritesAcrossBarriers) {
  for (const int size : {1, 2, 7}) {
    Team team(size);
    for (int job = 0; job < 20; ++job) {
      RingJob ring(&team, 20);
      team.Run(&ring);
      EXPECT_FALSE(ring.failed()) << size;
    }
  }
}

}  // namespace
}  // namespace epserve::runtime
