#include "runtime/symmetric/stale_heaps.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "runtime/symmetric/symmetric_heap.h"
#include "tests/runtime/symmetric/child_process.h"

namespace epserve::runtime {
namespace {

class StaleHeapsTest : public testing::Test {
 protected:
  ~StaleHeapsTest() override {
    for (const auto& entry : std::filesystem::directory_iterator(kShmDirectory)) {
      if (entry.path().filename().string().find(cluster_id_) != std::string::npos) {
        std::filesystem::remove(entry.path());
      }
    }
  }

  int NumSegments() const {
    int count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(kShmDirectory)) {
      if (entry.path().filename().string().find(cluster_id_) != std::string::npos) ++count;
    }
    return count;
  }

  HeapSpec Spec(int rank) const {
    HeapSpec spec;
    spec.cluster_id = cluster_id_;
    spec.epoch = 3;
    spec.rank = rank;
    spec.bytes = 8192;
    return spec;
  }

  const std::string cluster_id_ = absl::StrCat("stale-test-", ::getpid());
};

TEST_F(StaleHeapsTest, KilledOwnersHeapIsReclaimedAndLivingOnesStay) {
  ChildProcess dead(HEAP_OWNER, {cluster_id_, "3", "0", "8192"});
  ChildProcess living(HEAP_OWNER, {cluster_id_, "3", "1", "8192"});
  ASSERT_TRUE(dead.started() && living.started());
  ASSERT_FALSE(dead.ReadLine().empty());
  const std::string handle = FromHex(living.ReadLine());
  auto own = SymmetricHeap::Create(Spec(2));
  ASSERT_TRUE(own.ok());
  ASSERT_EQ(NumSegments(), 3);
  EXPECT_EQ(*ReclaimStaleHeaps(cluster_id_), 0);

  dead.Kill();
  EXPECT_EQ(*ReclaimStaleHeaps(cluster_id_), 1);
  EXPECT_EQ(NumSegments(), 2);
  EXPECT_TRUE(PeerHeap::Open(handle, Spec(1)).ok());
  EXPECT_TRUE(PeerHeap::Open(own->handle(), Spec(2)).ok());
  EXPECT_EQ(*ReclaimStaleHeaps(cluster_id_), 0);
}

TEST_F(StaleHeapsTest, PeerThatHasADeadOwnersHeapMappedDoesNotKeepItsName) {
  ChildProcess owner(HEAP_OWNER, {cluster_id_, "3", "0", "8192"});
  const auto peer = PeerHeap::Open(FromHex(owner.ReadLine()), Spec(0));
  ASSERT_TRUE(peer.ok()) << peer.status();
  owner.Kill();
  EXPECT_EQ(*ReclaimStaleHeaps(cluster_id_), 1);
  EXPECT_EQ(NumSegments(), 0);
}

TEST_F(StaleHeapsTest, OtherClustersAndOtherFilesAreNotTouched) {
  const std::string nonce = "0123456789abcdef";
  // Unlocked files, as a dead owner leaves them; only the last is this cluster's heap.
  for (const std::string& name :
       {absl::StrCat("epserve-", cluster_id_, "-x-3-0-", nonce),  // Cluster "<id>-x".
        absl::StrCat("epserve-", cluster_id_, "-9-3-0-", nonce),  // Cluster "<id>-9".
        absl::StrCat("epserve-x", cluster_id_, "-3-0-", nonce),
        absl::StrCat("epserve-", cluster_id_, "-3-0-", nonce, "0"),
        absl::StrCat("epserve-", cluster_id_, "-3-0-", "0123456789abcdeX"),
        absl::StrCat("epserve-", cluster_id_, "-3--", nonce),
        absl::StrCat("other-", cluster_id_, "-3-0-", nonce),
        absl::StrCat("epserve-", cluster_id_, "-3-0-", nonce)}) {
    std::ofstream(absl::StrCat(kShmDirectory, "/", name)) << "x";
  }
  ASSERT_EQ(NumSegments(), 8);
  EXPECT_EQ(*ReclaimStaleHeaps(cluster_id_), 1);
  EXPECT_EQ(NumSegments(), 7);
}

TEST_F(StaleHeapsTest, HeapsBeingCreatedWhileOthersReclaimAreNeverLost) {
  std::atomic<bool> stop{false};
  std::thread reclaimer([&] {
    while (!stop.load()) EXPECT_TRUE(ReclaimStaleHeaps(cluster_id_).ok());
  });
  for (int round = 0; round < 200; ++round) {
    auto heap = SymmetricHeap::Create(Spec(0));
    EXPECT_TRUE(heap.ok()) << heap.status();
    if (!heap.ok()) break;
    const auto peer = PeerHeap::Open(heap->handle(), Spec(0));
    EXPECT_TRUE(peer.ok()) << peer.status();
  }
  stop.store(true);
  reclaimer.join();
}

// In a process of its own, whose /dev/shm becomes what `mount` makes of it.
template <typename Mount, typename Use>
std::string MessageWithShm(Mount mount_shm, Use use) {
  int ends[2];
  EXPECT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    std::string message = "no mounts";
    if (::unshare(CLONE_NEWNS) == 0 && ::mount("", "/", "", MS_REC | MS_PRIVATE, "") == 0 &&
        mount_shm()) {
      message = std::string(use().message());
    }
    const bool told = ::write(ends[1], message.data(), message.size()) > 0;
    ::_exit(told ? 0 : 1);
  }
  ::close(ends[1]);
  char message[4096] = {};
  EXPECT_GT(::read(ends[0], message, sizeof(message) - 1), 0);
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return message;
}

TEST_F(StaleHeapsTest, SharedMemoryThatCannotBeUsedIsAnErrorThatSaysWhatToDo) {
  const std::string read_only =
      MessageWithShm([] { return ::mount("none", "/dev/shm", "tmpfs", MS_RDONLY, "") == 0; },
                     [&] { return SymmetricHeap::Create(Spec(0)).status(); });
  if (read_only == "no mounts") GTEST_SKIP() << "this user may not mount";
  EXPECT_NE(read_only.find("Read-only file system; mount a tmpfs at /dev/shm"), std::string::npos)
      << read_only;
  const std::string no_directory =
      MessageWithShm([] { return ::mount("none", "/dev", "tmpfs", 0, "") == 0; },
                     [] { return ReclaimStaleHeaps("c").status(); });
  EXPECT_NE(no_directory.find("No such file or directory; mount a tmpfs at /dev/shm"),
            std::string::npos)
      << no_directory;
}

TEST_F(StaleHeapsTest, BadClusterIdIsRefused) {
  EXPECT_EQ(ReclaimStaleHeaps("../x").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace epserve::runtime
