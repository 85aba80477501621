#include "runtime/symmetric/symmetric_heap.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

using ::testing::HasSubstr;

class SymmetricHeapTest : public testing::Test {
 protected:
  SymmetricHeapTest() {
    spec_.cluster_id = absl::StrCat("heap-test.", ::getpid());
    spec_.epoch = 7;
    spec_.rank = 2;
    spec_.bytes = 3 * 4096;
    spec_.layout_digest = 99;
  }

  // Paths of this test's segments, as the file system shows them.
  std::vector<std::string> Segments() const {
    std::vector<std::string> paths;
    for (const auto& entry : std::filesystem::directory_iterator(kShmDirectory)) {
      if (entry.path().filename().string().find(spec_.cluster_id) != std::string::npos) {
        paths.push_back(entry.path().string());
      }
    }
    return paths;
  }

  void ExpectRefused(const std::string& handle, const std::string& part) {
    const auto peer = PeerHeap::Open(handle, spec_);
    EXPECT_EQ(peer.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(peer.status().message()), HasSubstr(part));
  }

  HeapSpec spec_;
};

TEST_F(SymmetricHeapTest, PeerSeesWhatTheOwnerWritesAndTheOtherWayRound) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok()) << heap.status();
  ASSERT_EQ(heap->bytes(), spec_.bytes);
  for (std::uint64_t i = kHeapHeaderBytes; i < spec_.bytes; ++i) {
    ASSERT_EQ(heap->data()[i], std::byte{0});
  }
  auto peer = PeerHeap::Open(heap->handle(), spec_);
  ASSERT_TRUE(peer.ok()) << peer.status();
  heap->data()[5000] = std::byte{1};
  peer->data()[6000] = std::byte{2};
  EXPECT_EQ(peer->data()[5000], std::byte{1});
  EXPECT_EQ(heap->data()[6000], std::byte{2});
}

TEST_F(SymmetricHeapTest, SegmentIsNamedAfterItsOwnerAndReadableByThisUserAlone) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  const std::vector<std::string> segments = Segments();
  ASSERT_EQ(segments.size(), 1u);
  EXPECT_THAT(segments[0], testing::MatchesRegex(absl::StrCat("/dev/shm/epserve-heap-test[.]",
                                                              ::getpid(), "-7-2-[0-9a-f]+")));
  struct stat info;
  ASSERT_EQ(::stat(segments[0].c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  // Reserved, not only sized: all its blocks are there.
  EXPECT_GE(static_cast<std::uint64_t>(info.st_blocks) * 512, spec_.bytes);
}

TEST_F(SymmetricHeapTest, NameIsGoneAfterSealAndMappingsLiveOn) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  auto peer = PeerHeap::Open(heap->handle(), spec_);
  ASSERT_TRUE(peer.ok());
  heap->Seal();
  EXPECT_TRUE(Segments().empty());
  heap->data()[5000] = std::byte{9};
  EXPECT_EQ(peer->data()[5000], std::byte{9});
  const auto late = PeerHeap::Open(heap->handle(), spec_);
  EXPECT_EQ(late.status().code(), absl::StatusCode::kNotFound);
  heap->Seal();  // Again: nothing.
}

TEST_F(SymmetricHeapTest, NameIsGoneWithItsOwner) {
  { ASSERT_TRUE(SymmetricHeap::Create(spec_).ok()); }
  EXPECT_TRUE(Segments().empty());
}

TEST_F(SymmetricHeapTest, EpochsOfOneRankNeverShareMemory) {
  auto old_heap = SymmetricHeap::Create(spec_);
  ++spec_.epoch;
  auto new_heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(old_heap.ok() && new_heap.ok());
  old_heap->data()[5000] = std::byte{1};
  EXPECT_EQ(new_heap->data()[5000], std::byte{0});
}

TEST_F(SymmetricHeapTest, MovedHeapKeepsItsMemoryAndItsName) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  SymmetricHeap moved = *std::move(heap);
  EXPECT_EQ(Segments().size(), 1u);
  EXPECT_TRUE(PeerHeap::Open(moved.handle(), spec_).ok());
}

TEST_F(SymmetricHeapTest, HandleThatDiffersFromWhatIsExpectedIsRefusedByField) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  const std::string handle = heap->handle();
  ExpectRefused("", "size 0");
  ExpectRefused(handle.substr(1), "size 119");
  ExpectRefused(handle + "x", "size 121");
  std::string bad = handle;
  bad[0] ^= 1;
  ExpectRefused(bad, "magic");
  bad = handle;
  bad[8] ^= 1;
  ExpectRefused(bad, "version 0 is not the expected 1");

  const HeapSpec good = spec_;
  spec_.epoch = 8;
  ExpectRefused(handle, "epoch 7 is not the expected 8");
  spec_ = good;
  spec_.rank = 1;
  ExpectRefused(handle, "rank 2 is not the expected 1");
  spec_ = good;
  spec_.bytes += 4096;
  ExpectRefused(handle, "bytes 12288 is not the expected 16384");
  spec_ = good;
  spec_.layout_digest = 98;
  ExpectRefused(handle, "layout_digest 99 is not the expected 98");
  spec_ = good;
  spec_.cluster_id += "x";
  ExpectRefused(handle, "cluster_id is not the expected heap-test.");
  spec_ = good;
  EXPECT_TRUE(PeerHeap::Open(handle, spec_).ok());
}

TEST_F(SymmetricHeapTest, HandleOfAnotherNonceLeadsNowhere) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  std::string bad = heap->handle();
  bad[40] ^= 1;  // The nonce.
  EXPECT_EQ(PeerHeap::Open(bad, spec_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SymmetricHeapTest, SegmentWhoseHeaderIsNotTheHandlesIsRefused) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  heap->data()[16] ^= std::byte{1};  // The epoch in the header.
  ExpectRefused(heap->handle(), "is not the handle's");
}

TEST_F(SymmetricHeapTest, SegmentThatShrankIsRefusedInsteadOfMappedPastItsEnd) {
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  ASSERT_EQ(::truncate(Segments().at(0).c_str(), 8192), 0);
  ExpectRefused(heap->handle(), "has 8192 bytes, not the 12288 of its handle");
}

TEST_F(SymmetricHeapTest, SegmentOfAnotherUserIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "giving a file to another user takes root";
  auto heap = SymmetricHeap::Create(spec_);
  ASSERT_TRUE(heap.ok());
  ASSERT_EQ(::chown(Segments().at(0).c_str(), 65534, 65534), 0);
  const auto peer = PeerHeap::Open(heap->handle(), spec_);
  EXPECT_EQ(peer.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(peer.status().message()), HasSubstr("belongs to user 65534"));
}

TEST_F(SymmetricHeapTest, HeapLargerThanFreeSharedMemoryIsRefusedSayingNeededAndFree) {
  struct statvfs info;
  ASSERT_EQ(::statvfs(kShmDirectory, &info), 0);
  if (info.f_blocks == 0) GTEST_SKIP() << kShmDirectory << " has no limit here";
  spec_.bytes = static_cast<std::uint64_t>(info.f_blocks) * info.f_frsize + 4096;
  const auto heap = SymmetricHeap::Create(spec_);
  EXPECT_EQ(heap.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(heap.status().message()),
              HasSubstr(absl::StrCat(spec_.bytes, " bytes needed exceed the ")));
  EXPECT_THAT(std::string(heap.status().message()), HasSubstr(" bytes free in /dev/shm"));
  EXPECT_TRUE(Segments().empty());
}

TEST_F(SymmetricHeapTest, SpecOutsideItsLimitsIsRefused) {
  const HeapSpec good = spec_;
  const auto refused = [&](const std::function<void(HeapSpec*)>& spoil) {
    HeapSpec spec = good;
    spoil(&spec);
    return SymmetricHeap::Create(spec).status().code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](HeapSpec* spec) { spec->cluster_id = ""; }));
  EXPECT_TRUE(refused([](HeapSpec* spec) { spec->cluster_id = "a/b"; }));
  EXPECT_TRUE(refused([](HeapSpec* spec) { spec->cluster_id = std::string(65, 'a'); }));
  EXPECT_TRUE(refused([](HeapSpec* spec) { spec->epoch = 0; }));
  EXPECT_TRUE(refused([](HeapSpec* spec) { spec->rank = -1; }));
  EXPECT_TRUE(refused([](HeapSpec* spec) { spec->bytes = 4095; }));
  EXPECT_FALSE(refused([](HeapSpec* spec) { spec->cluster_id = std::string(64, 'a'); }));
}

}  // namespace
}  // namespace epserve::runtime
